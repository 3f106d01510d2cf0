"""The table of special tokens answers as torch.isin does, for ids inside it, beyond it and below 0."""

from __future__ import annotations

import pytest
import torch

from transcoder.antidup.special_tokens import SpecialTokens


@pytest.mark.parametrize("ids", [[], [0], [5], [7, 0, 3, 3], list(range(200))])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_the_table_is_isin(ids: list[int], dtype: torch.dtype) -> None:
    tokens = torch.tensor([[-1, 0, 1, 3, 4], [5, 6, 7, 8, 250_000]], dtype=dtype)
    special = SpecialTokens(ids)
    assert torch.equal(special.marked(tokens), torch.isin(tokens, torch.tensor(ids, dtype=dtype)))
    assert special.ids == sorted(set(ids))


def test_negative_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="expected token ids of at least 0, got -2"):
        SpecialTokens([3, -2])
