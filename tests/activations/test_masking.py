from __future__ import annotations

import pytest
import torch

from transcoder.activations.documents import DataError
from transcoder.activations.masking import SinkMasker, context_anchor, context_windows, find_sinks, heavy_tokens
from transcoder.activations.rows import Pass, RowMaker
from transcoder.config import ActivationsSection

CPU = torch.device("cpu")
BOS, PAD = 2, 0


def masker(pad_id: int | None = PAD, **section: object) -> SinkMasker:
    return SinkMasker(ActivationsSection(**section), [0, 1, BOS, 3], 50, pad_id, CPU)  # type: ignore[arg-type]


def random_pass(seed: int = 0, sequences: int = 4, length: int = 8) -> Pass:
    g = torch.Generator().manual_seed(seed)
    count = sequences * length
    tokens = torch.randint(4, 50, (count,), generator=g)
    tokens[::length] = BOS
    return Pass(
        source=torch.randn(count, 6, generator=g),
        target=torch.randn(count, 5, generator=g),
        tokens=tokens,
        positions=torch.arange(length).repeat(sequences),
        sequences=torch.arange(sequences).repeat_interleave(length),
        valid=torch.ones(count, dtype=torch.bool),
        shape=(sequences, length),
        where="test pass",
    )


def test_special_ids_are_masked_wherever_they_stand() -> None:
    found = random_pass()
    found.tokens[[3, 13]] = 1
    mask = masker(mask_norm_multiple=None).find(found.source, found.tokens, found.positions, found.valid)
    assert mask.by_id.nonzero().flatten().tolist() == [0, 3, 8, 13, 16, 24]
    assert torch.equal(mask.any, mask.by_id)


def test_norms_are_compared_with_the_median_over_non_pad_tokens() -> None:
    found = random_pass()
    found.source[:] = torch.nn.functional.normalize(found.source) * 2.0
    found.source[5] *= 10.5
    found.source[6] *= 9.5
    # Most tokens are pads of small norm: counted, they would pull the median down and mask everything else.
    found.tokens[9:] = PAD
    found.source[9:] *= 0.01
    mask = masker(mask_bos=False).find(found.source, found.tokens, found.positions, found.valid)
    assert mask.by_norm.nonzero().flatten().tolist() == [5]
    assert mask.norm_ratio[5].item() == pytest.approx(10.5, rel=1e-5)
    padded = found.valid.clone()
    padded[9:] = False
    by_valid = masker(pad_id=None).find(found.source, found.tokens, found.positions, padded)
    assert by_valid.by_norm.nonzero().flatten().tolist() == [5]


def test_the_norm_is_that_of_fp32_in_every_dtype() -> None:
    found = random_pass()
    found.source[5] = 300.0  # its square overflows float16
    for dtype in (torch.bfloat16, torch.float16):
        mask = masker().find(found.source.to(dtype), found.tokens, found.positions, found.valid)
        assert mask.by_norm.nonzero().flatten().tolist() == [5]


def test_a_token_is_counted_under_one_heading() -> None:
    found = random_pass()
    found.source[0] = 1000.0
    mask = masker(mask_position_zero=True).find(found.source, found.tokens, found.positions, found.valid)
    assert mask.by_id[0]
    assert not mask.by_norm[0]
    assert not mask.by_position[0]
    unmasked = masker(mask_bos=False, mask_position_zero=True)
    mask = unmasked.find(found.source, found.tokens, found.positions, found.valid)
    assert mask.by_position.nonzero().flatten().tolist() == [0, 8, 16, 24]


def test_masks_switched_off_mask_nothing() -> None:
    found = random_pass()
    found.source[5] = 1000.0
    mask = masker(mask_bos=False, mask_norm_multiple=None)
    assert not mask.find(found.source, found.tokens, found.positions, found.valid).any.any()


def test_sinks_are_dropped_and_counted() -> None:
    found = random_pass()
    found.source[5] = 1000.0
    maker = RowMaker(masker(), 0, None)
    rows, sinks, _ = maker.make(found)
    expected = [i for i in range(32) if i % 8 and i != 5]
    assert torch.equal(rows.source, found.source[expected])
    assert torch.equal(rows.target, found.target[expected])
    assert torch.equal(rows.tokens, found.tokens[expected])
    assert torch.equal(rows.positions, found.positions[expected])
    assert rows.sequences is not None
    assert torch.equal(rows.sequences, found.sequences[expected])
    assert sinks.tokens.tolist() == found.tokens[[0, 5, 8, 16, 24]].tolist()
    totals = maker.totals
    assert (totals["masked_by_id"], totals["masked_by_norm"], totals["tokens"]) == (4, 1, 32)
    assert totals["sink_ratio_max"] > 100


def test_padding_is_neither_row_nor_sink() -> None:
    found = random_pass()
    found.valid[20:] = False
    rows, sinks, _ = RowMaker(masker(), 4, None).make(found)
    assert len(rows) + len(sinks) == 20
    assert rows.contexts is not None
    last = rows.contexts[-1]  # token 19: what follows it is padding
    assert last[context_anchor(4)] == found.tokens[19]
    assert (last[context_anchor(4) + 1 :] == -1).all()


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_left_out_and_counted(
    side: str, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    found = random_pass()
    usual = RowMaker(masker(), 0, None).make(found)
    getattr(found, side)[7, 2] = value
    maker = RowMaker(masker(), 0, None)
    made = maker.make(found)
    for batch, before in ((made.rows, usual.rows), (made.sinks, usual.sinks)):
        assert bool(torch.isfinite(batch.source).all() & torch.isfinite(batch.target).all())
        places = {(int(s), int(p)) for s, p in zip(batch.sequences, batch.positions, strict=True)}
        all_places = {(int(s), int(p)) for s, p in zip(before.sequences, before.positions, strict=True)}
        bad = (int(found.sequences[7]), int(found.positions[7]))
        assert places == all_places - {bad}
    assert maker.totals["not_finite"] == 1
    assert "test pass: 1 of" in caplog.text
    getattr(found, side)[: len(found.tokens) // 4, 0] = value
    with pytest.raises(DataError, match=r"test pass: NaN or infinity.* tokens.*model\.dtype"):
        maker.make(found)


@pytest.mark.parametrize("width", [1, 2, 4, 7, 20])
def test_contexts_are_the_tokens_around(width: int) -> None:
    found = random_pass()
    index = torch.tensor([0, 3, 7, 8, 15, 31])
    windows = context_windows(found.tokens, found.positions, found.sequences, index, width)
    anchor = context_anchor(width)
    assert windows.shape == (6, width)
    assert windows.dtype == torch.int32
    grid = found.tokens.view(4, 8)
    for row, i in enumerate(index.tolist()):
        for column in range(width):
            place = i % 8 + column - anchor
            expected = grid[i // 8, place].item() if 0 <= place < 8 else -1
            assert windows[row, column] == expected


def test_three_quarters_of_a_window_stand_before_the_token() -> None:
    assert [context_anchor(w) for w in (1, 2, 5, 9, 20, 21)] == [0, 0, 3, 6, 14, 15]


def spread(count: int, sd: float, share: float, times: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(norms [count] with a log-normal bulk, which of them are planted sinks)."""
    g = torch.Generator().manual_seed(seed)
    norms = 7.0 * (sd * torch.randn(count, generator=g)).exp()
    sink = torch.rand(count, generator=g) < share
    norms[sink] = 7.0 * times * (0.05 * torch.randn(int(sink.sum()), generator=g)).exp()
    return norms, sink


@pytest.mark.parametrize("share", [0.005, 0.02, 0.05])
@pytest.mark.parametrize(
    ("times", "sd"), [(3, 0.06), (3, 0.15), (3, 0.25), (6, 0.06), (6, 0.35), (30, 0.06), (30, 0.35)]
)
def test_planted_sinks_are_found_whatever_their_norm(times: float, sd: float, share: float) -> None:
    for seed in range(3):
        norms, sink = spread(16384, sd, share, times, seed)
        found = find_sinks(norms)
        assert found is not None
        marked = norms > found.multiple * norms.median()
        assert bool(marked[sink].all())
        assert int((marked & ~sink).sum()) <= 0.006 * len(norms)
        assert found.share == pytest.approx(float(marked.double().mean()), abs=1e-4)


@pytest.mark.parametrize("tail", ["normal 0.06", "normal 0.5", "laplace", "student", "constant", "zero", "few"])
def test_tails_without_a_group_of_their_own_are_no_sinks(tail: str) -> None:
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(16384, generator=g)
    norms = {
        "normal 0.06": (0.06 * noise).exp(),
        "normal 0.5": (0.5 * noise).exp(),
        "laplace": (0.25 * noise.sign() * torch.rand(16384, generator=g).log()).exp(),
        "student": 1 + (noise / torch.randn(16384, 5, generator=g).square().mean(1).sqrt()).abs(),
        "constant": torch.ones(16384),
        "zero": torch.zeros(16384),
        "few": torch.tensor([1.0, 1.0, 50.0]),
    }[tail]
    assert find_sinks(norms) is None
    assert tail in ("laplace", "normal 0.5", "few") or not heavy_tokens(norms)


def test_what_is_no_number_is_no_sink() -> None:
    norms, _ = spread(4096, 0.1, 0.02, 6, 0)
    found = find_sinks(norms)
    assert found == find_sinks(torch.cat([norms, torch.tensor([float("nan"), float("inf")])]))


def test_the_mask_takes_the_multiple_that_was_fitted() -> None:
    norms, sink = spread(8192, 0.1, 0.02, 3, 0)
    norms /= norms.median()
    tokens = torch.where(sink, 7, torch.arange(8192) % 40 + 8)
    found = masker(mask_norm_multiple="auto")
    assert found.multiple == 10
    facts = found.fit(norms, tokens, torch.arange(8192) % 16)
    assert 1.3 < facts["multiple"] < 2.9
    assert facts["multiple"] == found.multiple
    assert facts["ids"] == [7]
    assert facts["share"] == pytest.approx(0.02, abs=0.004)
    valid = torch.ones(8192, dtype=torch.bool)
    mask = found.find(norms[:, None], tokens, torch.ones(8192, dtype=torch.int64), valid)
    assert torch.equal(mask.by_norm, sink)
    assert masker(mask_norm_multiple="auto").fit(torch.ones(999), tokens[:999], tokens[:999])["multiple"] == 10
