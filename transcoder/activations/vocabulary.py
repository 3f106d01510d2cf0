"""What the tokenizer knows: ids of a document, special ids, a display string for each id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from transcoder.activations.documents import DataError, Document, Messages
from transcoder.settings import brief

Ids = npt.NDArray[np.int32]


class Vocabulary:
    """A Hugging Face tokenizer (or none) and the model's vocabulary size.

    Args:
        tokenizer: a `PreTrainedTokenizerBase`, or None where only ids are known.
        size: the number of ids that the model embeds.
        special_ids: the ids that count as special; empty takes the tokenizer's.

    Attributes:
        special_ids: sorted ids of BOS, EOS, PAD and the tokenizer's other special tokens.
        bos_id, eos_id, pad_id: None where the tokenizer has none.
    """

    def __init__(self, tokenizer: Any | None, size: int, special_ids: Sequence[int] = ()) -> None:
        self.size = size
        self._tokenizer = tokenizer
        found = special_ids or getattr(tokenizer, "all_special_ids", ())
        self.special_ids = sorted({int(i) for i in found if i is not None and 0 <= int(i) < size})
        self.bos_id: int | None = getattr(tokenizer, "bos_token_id", None)
        self.eos_id: int | None = getattr(tokenizer, "eos_token_id", None)
        self.pad_id: int | None = getattr(tokenizer, "pad_token_id", None)

    def encode(self, document: Document) -> Ids:
        """[n] int32 token ids of a document, without BOS or EOS.

        Raises:
            DataError: an id outside the vocabulary, an entry that is no whole number, or text without a
                tokenizer.
        """
        if isinstance(document.content, (str, Messages)):
            if self._tokenizer is None:
                raise DataError(
                    f"{document.name}: text needs a tokenizer and the model has none; set activations.tokens_column"
                )
            text = document.content if isinstance(document.content, str) else self._conversation(document)
            ids = self._tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)[
                "input_ids"
            ]
            return self._check_range(document, np.asarray(ids, dtype=np.int64))
        try:
            ids = np.asarray(document.content)
        except ValueError:  # ragged lists
            ids = np.asarray([], dtype=object)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise DataError(
                f"{document.name}: expected a list of whole-number token ids in activations.tokens_column, got "
                f"{str(document.content)[:80]}"
            )
        return self._check_range(document, ids)

    def _conversation(self, document: Document) -> str:
        """The messages of a document as the tokenizer's chat template writes them, without its BOS: packing adds that."""
        tokenizer: Any = self._tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"{document.name}: it holds messages with roles, and this tokenizer has no chat template to make text of them; "
                "set activations.text_column to a column of text, or use the instruct model's tokenizer"
            )
        try:
            text = tokenizer.apply_chat_template(list(document.content), tokenize=False)
        except Exception as error:  # a template raises what it likes
            raise DataError(
                f"{document.name}: the tokenizer's chat template does not take these messages: {brief(error)}"
            ) from error
        return str(text).removeprefix(getattr(tokenizer, "bos_token", None) or "")

    def _check_range(self, document: Document, ids: npt.NDArray[Any]) -> Ids:
        if not len(ids):
            return np.empty(0, np.int32)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.size:
            raise DataError(
                f"{document.name}: token ids must lie in [0, {self.size}), the model's vocabulary, and this "
                f"document has {low if low < 0 else high}; was it made with another tokenizer?"
            )
        return ids.astype(np.int32)

    def decode_tokens(self, ids: Sequence[int]) -> list[str]:
        """One display string for each id: its text, spaces kept; `str(id)` without a tokenizer."""
        if self._tokenizer is None:
            return [str(int(i)) for i in ids]
        known = len(self._tokenizer)
        shown: dict[int, str] = {}
        for i in {int(i) for i in ids}:
            shown[i] = self._display(i) if 0 <= i < known else str(i)
        return [shown[int(i)] for i in ids]

    def _display(self, token: int) -> str:
        assert self._tokenizer is not None
        text = self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        # A lone byte of a multi-byte character decodes to the replacement mark: the vocabulary's own
        # spelling says more.
        if text == "" or "�" in text:
            return str(self._tokenizer.convert_ids_to_tokens(token))
        return str(text)
