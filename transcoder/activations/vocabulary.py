"""What the tokenizer knows: ids of a document, special ids, a display string for each id."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from transcoder.activations.documents import DataError, Document, Messages, Unusable
from transcoder.settings import brief

logger = logging.getLogger(__name__)

Ids = npt.NDArray[np.int32]


_TOKENIZER_FILES = ("tokenizer*", "*vocab*", "merges*", "spiece*", "*.model", "*.tiktoken")


def own_tokenizer(model: str) -> Any | None:
    """The tokenizer of a model (folder or hub name) as its files have it; None where there is none. Without its files
    transformers may make an empty one."""
    from transformers import AutoTokenizer

    folder = Path(model)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception:  # dozens of types, as for a model
        return None


def no_tokenizer() -> Any:
    """What TransformerLens is given in the place of a tokenizer that a model does not have: it would refuse the model."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"-": 0}, unk_token="-")))


class Vocabulary:
    """A Hugging Face tokenizer (or none) and the model's vocabulary size.

    Args:
        tokenizer: a `PreTrainedTokenizerBase`, or None where only ids are known.
        size: the number of ids that the model embeds.
        special_ids: the ids that count as special; empty takes the tokenizer's.
        bos_stands_in: the tokenizer's BOS is one that TransformerLens put there, its EOS.

    Attributes:
        special_ids: sorted ids of BOS, EOS, PAD and the tokenizer's other special tokens.
        bos_id, eos_id, pad_id: None where the tokenizer has none.
        bos_stands_in: `bos_id` is the EOS of a tokenizer that has no BOS.
    """

    def __init__(
        self, tokenizer: Any | None, size: int, special_ids: Sequence[int] = (), bos_stands_in: bool = False
    ) -> None:
        self.size, self.bos_stands_in = size, bos_stands_in
        self._tokenizer = tokenizer
        found = special_ids or getattr(tokenizer, "all_special_ids", ())
        self.special_ids = sorted({int(i) for i in found if i is not None and 0 <= int(i) < size})
        self.bos_id: int | None = getattr(tokenizer, "bos_token_id", None)
        self.eos_id: int | None = getattr(tokenizer, "eos_token_id", None)
        self.pad_id: int | None = getattr(tokenizer, "pad_token_id", None)

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    def check(self) -> None:
        """Compare the tokenizer's ids with the model's: a warning where only added tokens lie outside, which text may not have.

        Raises:
            DataError: ordinary tokens or BOS lie outside: it is another model's tokenizer.
        """
        if self._tokenizer is None:
            return
        outside = {word: i for word, i in self._tokenizer.get_vocab().items() if i >= self.size}
        if self.bos_id is not None and self.bos_id >= self.size and not self.bos_stands_in:
            outside.setdefault(str(self._tokenizer.bos_token), self.bos_id)
        added = {*self._tokenizer.get_added_vocab(), *self._tokenizer.all_special_tokens} - {self._tokenizer.bos_token}
        if not outside.keys() <= added:
            raise DataError(
                f"model.name: the tokenizer has ids up to {max(outside.values())} and the model embeds {self.size} "
                f"({len(outside)} tokens lie outside, such as {next(iter(outside))!r}): it is not this model's tokenizer; put "
                "the right one into the model's folder, or read ids by activations.tokens_column from a folder without one"
            )
        if self.eos_id is not None and self.eos_id >= self.size:
            between = "BOS" if self.bos_id is not None and self.bos_id < self.size else "nothing"
            logger.warning(
                "the tokenizer's EOS %r is id %d and the model embeds %d: documents are separated by %s",
                self._tokenizer.eos_token, self.eos_id, self.size, between,
            )  # fmt: skip
        told = [word for word, i in outside.items() if i != self.bos_id and i != self.eos_id and i != self.pad_id]
        if told:
            logger.warning(
                "the tokenizer has %d added tokens that the model does not embed, such as %r: text that holds them is refused",
                len(told),
                told[0],
            )

    def encode(self, document: Document) -> Ids:
        """[n] int32 token ids of a document, without BOS or EOS.

        Raises:
            DataError: an id outside the vocabulary, an entry that is no whole number, or text without a
                tokenizer. Unusable: messages that the chat template refuses, or a list of padding alone.
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
        unpadded = self._unpadded(ids)
        if len(ids) and not len(unpadded):
            raise Unusable("only padding")
        return self._check_range(document, unpadded)

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
            raise Unusable(f"refused by the chat template ({brief(error, 80)})") from error
        return str(text).removeprefix(getattr(tokenizer, "bos_token", None) or "")

    def _unpadded(self, ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A list of ids without the padding at its ends. Of a tokenizer that pads with EOS or BOS, one of them stays."""
        if self.pad_id is None or not len(ids) or self.pad_id not in (ids[0], ids[-1]):
            return ids
        inside = (ids != self.pad_id).nonzero()[0]
        if not len(inside):
            return ids[:0]
        doubles = int(self.pad_id in (self.eos_id, self.bos_id))
        return ids[max(0, inside[0] - doubles) : inside[-1] + 1 + doubles]

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
        # A piece of a character decodes to the replacement mark: the vocabulary's own spelling says which bytes it has.
        if text == "" or "�" in text:
            return bytes_spelled(str(self._tokenizer.convert_ids_to_tokens(token)))
        return str(text)


def bytes_spelled(piece: str) -> str:
    """A piece of a byte-level vocabulary as text, its bytes that are no whole character as `<0xE6>`, which is how other
    vocabularies spell a byte. What is not of such a vocabulary is returned as it is.

    >>> bytes_spelled("Ġæ"), bytes_spelled("▁the")
    (' <0xE6>', '▁the')
    """
    if not set(piece) <= _BYTES.keys():
        return piece
    raw = bytes(_BYTES[c] for c in piece)
    lone = (
        f"<0x{ord(c) - 0xDC00:02X}>" if "\udc80" <= c <= "\udcff" else c for c in raw.decode("utf-8", "surrogateescape")
    )
    return "".join(lone)


def _byte_characters() -> dict[str, int]:
    """How byte-level vocabularies (GPT-2's and its followers) write bytes: printable ones of Latin-1 as they are, the others,
    in order, as the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


_BYTES = _byte_characters()
