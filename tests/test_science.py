"""bench.science: its generators plant what they say, its table tells pass from short, its quick mode meets every target."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from bench.science import __main__ as science
from bench.science import stages
from bench.science import toy as toy_module
from bench.science.planted import RHOS, Stream, batches
from bench.science.s0_monitor import two_pass
from bench.science.table import Line, at_least, at_most, render
from bench.science.toy import D_SAE, D, Sinks, Toy, examine, independent, unmasked
from bench.statistics import of_mean, of_share, of_two
from transcoder import Transcoder, TranscoderConfig
from transcoder.activations.masking import SinkMask, SinkMasker


def test_planted_pairs_have_their_correlation_and_support() -> None:
    stream = Stream(replicas=2, tokens=1 << 16, blocks=1, seed=3)
    codes = stream.block(0)
    rho, support, overlap = stream.truth()
    i = torch.arange(0, 2 * stream.pairs, 2)
    r = two_pass([codes], i, i + 1)
    fires = codes.to_dense() > 0
    assert torch.equal((fires[:, i] | fires[:, i + 1]).sum(0), support)
    for mode in (True, False):
        for value in RHOS:
            cell = (rho == torch.tensor(value)) & (support == 1000) & (overlap == mode)
            # Two pairs of 1000 tokens with exponential amplitudes: a standard error of about 0.05.
            assert float(r[cell].mean()) == pytest.approx(value, abs=0.12)
    again = stream.block(0)
    assert torch.equal(codes.values, again.values)
    assert not torch.equal(codes.values[:99], stream.block(1).values[:99])


def test_batches_are_the_block() -> None:
    codes = Stream(replicas=1, tokens=5000, blocks=1, seed=0).block(0)
    parts = [part.to_dense() for _, part in batches(codes, 1024)]
    assert [len(p) for p in parts] == [1024] * 4 + [904]
    assert torch.equal(torch.cat(parts), codes.to_dense())


def test_a_masked_toy_drops_its_sinks_and_no_other_token() -> None:
    toy = Toy(independent(40, 3), 40, seed=1, sinks=Sinks(bos_every=0.05, norm_share=0.02))
    _, _, sink = toy.tokens(4096, 0)
    assert 0.04 < float(sink.float().mean()) < 0.1
    stream = toy.batches()
    rows = torch.cat([next(stream).source for _ in range(4)])
    whole = torch.cat([toy.tokens(1024, key)[0].source[~toy.tokens(1024, key)[2]] for key in range(3)])
    assert torch.equal(rows, whole[: len(rows)])


def test_a_sink_that_the_mask_misses_counts_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_module, "HELDOUT_TOKENS", 4096)
    toy = Toy(independent(40, 3), 40, seed=1, sinks=Sinks(bos_every=0.05, norm_share=0.02))
    model = Transcoder(TranscoderConfig(d_in=D, d_out=D, d_sae=D_SAE, k=4), seed=0).eval()
    batch, _, sink = toy.heldout()
    assert torch.equal(toy.let_through(batch), ~sink)
    masked, bare = examine(model, toy), examine(model, unmasked(toy))
    assert bare.sink_only > 0
    assert bare.pairs > masked.pairs
    assert masked.sink_only == 0

    def finds_nothing(self: SinkMasker, source: Tensor, *_: Tensor) -> SinkMask:
        nothing = torch.zeros(len(source), dtype=torch.bool)
        return SinkMask(nothing, nothing, nothing, nothing.float())

    monkeypatch.setattr(SinkMasker, "find", finds_nothing)
    broken = examine(model, toy)
    assert (broken.sink_only, broken.pairs) == (bare.sink_only, bare.pairs)


def test_the_table_says_pass_short_or_nothing() -> None:
    lines = [at_most("S", "a", 1.0, 2.0), at_least("S", "b", 1.0, 2.0, " %"), Line("S", "c", "3", "", None)]
    assert [line.met for line in lines] == [True, False, None]
    assert [row.split()[-1] for row in render(lines).splitlines()[1:]] == ["pass", "SHORT", "3"]


def test_intervals_behind_shares_means_and_ratios() -> None:
    assert of_share(0, 0) == ""
    assert of_share(0, 20) == " [0, 0.1611]"  # Wilson's, by hand: z^2 / (n + z^2)
    assert of_share(10, 20, 100, 3) == " [29.9, 70.1]"
    assert of_mean([1.0]) == ""
    assert of_mean([1.0, 2.0, 3.0]) == "+-2.5"  # 4.303 / sqrt(3)
    down = lambda before, after: 100 * (1 - after / before)  # noqa: E731
    assert of_two([40.0, 38.0], [4.0, 5.0], down) == ""
    assert of_two([40.0, 40.0, 40.0], [4.0, 4.0, 4.0], down) == " [90, 90]"
    # A difference of means: the pseudo-values are the paired differences themselves.
    assert of_two([1.0, 2.0, 4.0], [2.0, 4.0, 7.0], lambda a, b: b - a) == " [-0.4841, 4.484]"


def test_a_short_line_is_an_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(science.ALL, "s1", lambda quick, seed: [at_most("S1", "x", 3.0, 2.0)])
    monkeypatch.setitem(science.ALL, "s2", lambda quick, seed: [at_most("S2", "x", 1.0, 2.0)])
    assert science.main(["--only", "s2"]) == 0
    assert science.main(["--only", "s1,s2", "--json", str(tmp_path / "lines.json")]) == 1
    assert [line["met"] for line in json.loads((tmp_path / "lines.json").read_text())] == [False, True]
    assert (
        science.main(["--only", "s2", "--beside", str(tmp_path / "lines.json"), "--json", str(tmp_path / "all.json")])
        == 1
    )
    assert [line["stage"] for line in json.loads((tmp_path / "all.json").read_text())] == ["S1", "S2"]
    with pytest.raises(SystemExit):
        science.main(["--only", "s9"])


def test_no_worse_is_said_of_the_whole_interval() -> None:
    base = [SimpleNamespace(mcc=0.9) for _ in range(5)]
    for mean, spread, met in ((-0.002, 0.001, True), (-0.002, 0.02, False), (-0.03, 0.001, False), (0.01, 0.001, True)):
        other = [SimpleNamespace(mcc=0.9 + mean + spread * n) for n in (-2, -1, 0, 1, 2)]
        assert stages._not_lowered("S", "x", base, other, "mcc").met is met  # type: ignore[arg-type]
    one = stages._not_lowered("S", "x", base[:1], [SimpleNamespace(mcc=0.885)], "mcc")  # type: ignore[arg-type, list-item]
    assert one.met is True  # a single seed may be twice as far off


@pytest.mark.slow
@pytest.mark.command("-m", "bench.science", "--quick")
@pytest.mark.timeout(900)
def test_the_quick_mode_meets_every_target(finished_command: subprocess.CompletedProcess[str]) -> None:
    assert finished_command.returncode == 0, finished_command.stdout
    assert "0 short" in finished_command.stdout
