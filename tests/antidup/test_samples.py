"""The collector keeps the strongest examples and a fair sample over positions, in fixed memory."""

from __future__ import annotations

import copy
import json
import resource
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from transcoder.activations.batch import ActivationBatch
from transcoder.antidup import ActivationSampleCollector, UsageLedger
from transcoder.antidup.sample_store import Samples, best_entries, merged, without_overlap
from transcoder.config import SamplesSection
from transcoder.kernels import SparseCodes, use_backend
from transcoder.usage import REQUIRED_EFFECTS

pq = pytest.importorskip("pyarrow.parquet")

LENGTH, WIDTH, ANCHOR, D_SAE = 40, 6, 4, 12
SECTION = SamplesSection(
    collect_every=1, top_per_latent=4, stratified_per_latent=10, context_tokens=WIDTH, min_activation=0.05
)
BOS = 0


class Text:
    """Random sequences, random activations, batches of shuffled tokens with their contexts."""

    def __init__(self, sequences: int, seed: int, density: float = 0.3) -> None:
        g = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(1, 50, (sequences, LENGTH), generator=g)
        self.tokens[:, 0] = BOS
        z = torch.rand(sequences * LENGTH, D_SAE, generator=g)
        self.z = z * (torch.rand(sequences * LENGTH, D_SAE, generator=g) < density)
        self.order = torch.randperm(sequences * LENGTH, generator=g)

    def batch(self, index: Tensor) -> ActivationBatch:
        sequence, position = index // LENGTH, index % LENGTH
        place = position[:, None] + torch.arange(WIDTH) - ANCHOR
        inside = (place >= 0) & (place < LENGTH)
        contexts = torch.where(inside, self.tokens[sequence[:, None], place.clamp(0, LENGTH - 1)], -1)
        nothing = torch.zeros(index.numel(), 1)
        return ActivationBatch(
            nothing, nothing, self.tokens[sequence, position], position, sequence, None, contexts.int(), ANCHOR
        )

    def batches(self, size: int) -> list[tuple[SparseCodes, ActivationBatch]]:
        return [(SparseCodes.from_dense(self.z[i]), self.batch(i)) for i in self.order.split(size)]


def collector(folder: Path, section: SamplesSection = SECTION, d_sae: int = D_SAE) -> ActivationSampleCollector:
    ledger = UsageLedger(dict.fromkeys(REQUIRED_EFFECTS, True), folder / "usage.json")
    return ActivationSampleCollector(section, d_sae, "cpu", 0, folder / "activation_samples", [BOS], LENGTH, ledger)


def collected(folder: Path, text: Text, section: SamplesSection = SECTION) -> ActivationSampleCollector:
    part = collector(folder, section)
    for step, (codes, batch) in enumerate(text.batches(100), 1):
        part.collect(codes, batch, step)
    return part


def words(ids: Sequence[int]) -> list[str]:
    return [f"<{i}>" for i in ids]


def rows_of(folder: Path) -> list[dict]:
    return pq.read_table(folder / "activation_samples" / "samples.parquet").to_pylist()


def greedy_top(text: Text, latent: int, k: int) -> list[float]:
    """The k strongest activations, skipping contexts that overlap a stronger kept one: the definition, by a
    loop."""
    kept: list[tuple[int, int, float]] = []
    for n in text.z[:, latent].sort(descending=True, stable=True).indices.tolist():
        value, s, p = float(text.z[n, latent]), n // LENGTH, n % LENGTH
        if value >= SECTION.min_activation and all(s != t or abs(p - q) >= WIDTH for t, q, _ in kept):
            kept.append((s, p, value))
    return [v for *_, v in kept[:k]]


def test_the_strongest_of_the_whole_stream_are_kept(tmp_path: Path) -> None:
    # One latent in a hundred tokens: within a batch no two of its strongest overlap, so the stream's greedy
    # choice is known.
    text = Text(50, 0, density=0.02)
    collected(tmp_path, text).save(20, words)
    for latent in range(D_SAE):
        got = [r["activation"] for r in rows_of(tmp_path) if r["latent"] == latent and r["kind"] == "top"]
        assert got == pytest.approx(greedy_top(text, latent, 4))


def test_a_row_tells_where_it_came_from(tmp_path: Path) -> None:
    text = Text(20, 1)
    part = collected(tmp_path, text)
    paths = part.save(8, words)
    assert paths == [tmp_path / "activation_samples" / n for n in ("samples.parquet", "summary.json")]
    table = pq.read_table(paths[0])
    assert {f.name: str(f.type) for f in table.schema} == {
        "latent": "int32",
        "kind": "string",
        "activation": "float",
        "token": "int32",
        "position": "int32",
        "sequence": "int64",
        "step": "int32",
        "context": "list<element: int32>",
        "anchor": "int16",
        "tokens": "list<element: string>",
    }
    order = {int(n): step for step, part_of in enumerate(text.order.split(100), 1) for n in part_of}
    rows = table.to_pylist()
    assert {r["kind"] for r in rows} == {"top", "stratified"}
    for row in rows:
        s, p = row["sequence"], row["position"]
        assert row["activation"] == pytest.approx(float(text.z[s * LENGTH + p, row["latent"]]))
        assert row["token"] == int(text.tokens[s, p]) == row["context"][row["anchor"]]
        first = max(0, p - ANCHOR)
        assert row["context"] == text.tokens[s, first : p - ANCHOR + WIDTH].tolist()
        assert row["tokens"] == words(row["context"])
        assert row["step"] == order[s * LENGTH + p]
    assert list(paths[0].parent.glob("*.tmp")) == []


def test_contexts_of_one_store_do_not_overlap(tmp_path: Path) -> None:
    text = Text(4, 2, density=0.9)  # few sequences: nearly everything overlaps something
    collected(tmp_path, text).save(2, words)
    for kind in ("top", "stratified"):
        for latent in range(D_SAE):
            places = [
                (r["sequence"], r["position"]) for r in rows_of(tmp_path) if (r["latent"], r["kind"]) == (latent, kind)
            ]
            for a, (s, p) in enumerate(places):
                assert all(s != t or abs(p - q) >= WIDTH for t, q in places[:a])


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_samples_of_old_weights_are_forgotten(backend: str, tmp_path: Path) -> None:
    """A latent that was strong early and is weak now shows what it is now; one that no longer fires shows nothing."""
    text = Text(20, seed=2)
    text.z[:, 0] = text.z[:, 0] * torch.where(
        torch.arange(len(text.z)).argsort()[text.order.argsort()] < 300, 10.0, 1.0
    )
    late = text.order.argsort() >= 300
    text.z[late, 1] = 0
    ledger = UsageLedger(dict.fromkeys(REQUIRED_EFFECTS, True), tmp_path / "usage.json")
    folder = tmp_path / "activation_samples"
    part = ActivationSampleCollector(SECTION, D_SAE, "cpu", 0, folder, [BOS], LENGTH, ledger, None, 3)
    with use_backend(backend):
        for step, (codes, batch) in enumerate(text.batches(100)):
            part.collect(codes, batch, step)
        part.save(7, words)
    rows = rows_of(tmp_path)
    assert {row["step"] for row in rows} <= {4, 5, 6, 7}
    assert max(row["activation"] for row in rows if row["latent"] == 0) <= 1.0
    assert {row["latent"] for row in rows} == {0, *range(2, D_SAE)}


def test_every_bin_has_its_samples_and_sinks_their_share(tmp_path: Path) -> None:
    text = Text(60, 3)
    text.z[::LENGTH] = 5.0  # BOS excites every latent, as sinks do
    part = collected(tmp_path, text)
    part.save(24, words)
    rows = [r for r in rows_of(tmp_path) if r["kind"] == "stratified"]
    for latent in range(D_SAE):
        own = [r for r in rows if r["latent"] == latent]
        sinks = [r for r in own if r["token"] == BOS]
        assert 0 < len(sinks) <= 0.2 * len(own)
        bins = np.bincount([r["position"] * 10 // LENGTH for r in own if r["token"] != BOS], minlength=10)
        # Two a bin, less what overlaps a neighbouring bin's sample.
        assert bins.min() >= 1
        assert bins.max() == 2
        assert bins.sum() >= 17
    summary = json.loads((tmp_path / "activation_samples" / "summary.json").read_text())
    assert summary["schema_version"] == 1
    assert summary["step"] == 24
    assert summary["latents_followed"] == summary["latents_with_samples"] == D_SAE
    assert summary["samples_kept"] == len(rows_of(tmp_path))
    assert sum(summary["position_bins"]) == len(rows)
    assert summary["sink_fraction"] == pytest.approx(len([r for r in rows if r["token"] == BOS]) / len(rows))
    assert summary["file"] == "samples.parquet"


def test_a_latent_of_sinks_alone_has_no_stratified_sample(tmp_path: Path) -> None:
    text = Text(30, 4)
    text.z[:, 5] = 0
    text.z[::LENGTH, 5] = 3.0
    collected(tmp_path, text).save(12, words)
    kinds = [r["kind"] for r in rows_of(tmp_path) if r["latent"] == 5]
    assert kinds == ["top"] * 4
    none = replace(SECTION, max_sink_fraction=0.0)
    collected(tmp_path, text, none).save(12, words)
    assert all(r["token"] != BOS for r in rows_of(tmp_path) if r["kind"] == "stratified")


def test_the_reservoir_is_uniform_within_a_bin(tmp_path: Path) -> None:
    # Every token of a bin has the same chance, early or late in the stream, strong or weak.
    g = torch.Generator().manual_seed(5)
    tokens, d_sae = 2000, 400
    section = replace(SECTION, position_bins=1, stratified_per_latent=4, min_per_bin=0, context_tokens=1)
    part = collector(tmp_path, section, d_sae)
    z = torch.rand(tokens, d_sae, generator=g) + 0.1
    for step in range(1, 11):
        index = torch.arange((step - 1) * 200, step * 200)
        nothing = torch.zeros(200, 1)
        batch = ActivationBatch(nothing, nothing, index % 30 + 1, index % LENGTH, index)
        part.collect(SparseCodes.from_dense(z[index]), batch, step)
    part.save(10, words)
    rows = [r for r in rows_of(tmp_path) if r["kind"] == "stratified"]
    assert len(rows) == 4 * d_sae
    when = np.bincount([r["step"] - 1 for r in rows], minlength=10)
    expected = 4 * d_sae / 10
    assert ((when - expected) ** 2 / expected).sum() < 30  # chi-squared, 9 degrees of freedom: p < 0.0005
    strength = np.mean([r["activation"] for r in rows])
    assert strength == pytest.approx(0.6, abs=0.03)


def test_weak_activations_and_latents_not_followed_are_left_out(tmp_path: Path) -> None:
    section = replace(SECTION, max_latents=5, min_activation=0.5)
    part = collected(tmp_path, Text(20, 6), section)
    part.save(8, words)
    rows = rows_of(tmp_path)
    assert {r["latent"] for r in rows} == set(part.latents.tolist()) == {0, 2, 4, 7, 9}
    assert min(r["activation"] for r in rows) >= 0.5
    table = part._stores
    assert table is not None
    assert table[0].score.shape == (5, 4)


def test_resume_in_the_middle_changes_nothing(tmp_path: Path) -> None:
    batches = Text(30, 7).batches(100)
    whole, half, resumed = (collector(tmp_path / name) for name in ("whole", "half", "resumed"))
    for step, (codes, batch) in enumerate(batches, 1):
        whole.collect(codes, batch, step)
        if step <= 5:
            half.collect(codes, batch, step)
    resumed.load_state_dict(copy.deepcopy(half.state_dict()))
    for step, (codes, batch) in enumerate(batches, 1):
        if step > 5:
            resumed.collect(codes, batch, step)
    for part in (whole, resumed):
        part.save(12, words)
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "resumed")
    fresh = collector(tmp_path / "fresh")
    fresh.load_state_dict(collector(tmp_path / "never").state_dict())
    with pytest.raises(ValueError, match="expected a store of"):
        collector(tmp_path / "other", replace(SECTION, top_per_latent=3)).load_state_dict(half.state_dict())


def test_batches_without_contexts_or_sequences(tmp_path: Path) -> None:
    part = collector(tmp_path)
    z = torch.rand(30, D_SAE, generator=torch.Generator().manual_seed(8))
    nothing = torch.zeros(30, 1)
    part.collect(
        SparseCodes.from_dense(z), ActivationBatch(nothing, nothing, torch.arange(30) + 1, torch.arange(30)), 1
    )
    part.save(1, words)
    for row in rows_of(tmp_path):
        assert row["context"] == [row["token"]]
        assert row["anchor"] == 0
        assert row["sequence"] == -1


def test_nothing_collected_saves_an_empty_file(tmp_path: Path) -> None:
    part = collector(tmp_path)
    nothing = torch.zeros(0, 1)
    part.collect(
        SparseCodes.from_dense(torch.zeros(0, D_SAE)),
        ActivationBatch(nothing, nothing, torch.empty(0).long(), torch.empty(0).long()),
        1,
    )
    part.save(1, words)
    assert rows_of(tmp_path) == []
    top_only = collected(tmp_path, Text(5, 9), replace(SECTION, stratified_per_latent=0))
    top_only.save(2, words)
    assert {r["kind"] for r in rows_of(tmp_path)} == {"top"}


def test_collect_every_and_the_ledger(tmp_path: Path) -> None:
    part = collector(tmp_path, replace(SECTION, collect_every=3))
    codes, batch = Text(5, 10).batches(100)[0]
    for step in range(1, 8):
        part.collect(codes, batch, step)
    record = part._ledger.record()["components"]["activation_samples"]
    assert record["calls"] == 2
    assert record["effect"]["samples_kept"] > 0
    part.save(7, words)
    record = part._ledger.record()["components"]["activation_samples"]
    assert record["files"] == ["activation_samples/samples.parquet", "activation_samples/summary.json"]


def test_mismatches_are_refused(tmp_path: Path) -> None:
    part = collector(tmp_path)
    codes, batch = Text(5, 11).batches(100)[0]
    with pytest.raises(ValueError, match=r"codes: expected shape \(100, 13\), got \(100, 12\)"):
        collector(tmp_path, SECTION, 13).collect(codes, batch, 1)
    part.collect(codes, batch, 1)
    with pytest.raises(ValueError, match=r"decode_tokens: expected \d+ strings, got 1"):
        part.save(1, lambda ids: ["one"])


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_contexts_of_another_width_are_refused_by_name(backend: str, tmp_path: Path) -> None:
    text = Text(4, 3)
    codes, batch = text.batches(100)[0]
    assert batch.contexts is not None
    with use_backend(backend):
        part = collector(tmp_path)
        part.collect(codes, batch, 1)
        before = copy.deepcopy(part.state_dict())
        for other in (replace(batch, contexts=batch.contexts[:, :-1]), replace(batch, context_anchor=ANCHOR - 1)):
            with pytest.raises(
                ValueError, match=r"batch.contexts: expected the first batch's width 6 and anchor 4, got"
            ):
                part.collect(codes, other, 2)
    assert all(torch.equal(before["top"][n], t) for n, t in part.state_dict()["top"].items())


def test_words_that_are_no_utf8_are_written_all_the_same(tmp_path: Path) -> None:
    paths = collected(tmp_path, Text(4, 3)).save(7, lambda ids: [chr(0xD800) + "ab"] * len(ids))
    found = {w for row in pq.read_table(paths[0]).column("tokens").to_pylist() for w in row}
    assert found == {"?ab"}


def test_best_entries_are_a_loop_over_groups() -> None:
    g = torch.Generator().manual_seed(12)
    group = torch.randint(0, 9, (200,), generator=g)  # group 8 takes no part
    score = torch.randint(0, 20, (200,), generator=g).float()
    table = best_entries(group, score, 8, 5)
    for n in range(8):
        own = [e for e in range(200) if group[e] == n]
        expected = sorted(own, key=lambda e: (-float(score[e]), e))[:5]
        assert table[n].tolist() == expected + [-1] * (5 - len(expected))
    assert best_entries(group[:0], score[:0], 8, 5).tolist() == [[-1] * 5] * 8
    assert best_entries(group, score, 8, 0).shape == (8, 0)


def some_samples(sequence: list[int], position: list[int], score: list[float]) -> Samples:
    n = len(score)
    whole = torch.arange(n)[None]
    return Samples(
        torch.tensor([score]),
        torch.tensor([score]),
        whole,
        torch.tensor([position]),
        torch.tensor([sequence]),
        whole,
        torch.zeros(1, n, 2, dtype=torch.int32),
    )


def test_a_dropped_sample_does_not_drop_others() -> None:
    # 10 is best; 13 overlaps it and goes; 16 overlaps only 13, so it stays. Unknown sequences never overlap.
    chain = some_samples([1, 1, 1, 2, -1, -1], [10, 13, 16, 10, 10, 10], [9, 8, 7, 6, 5, 4])
    assert without_overlap(chain.score, chain.position, chain.sequence, 5).tolist() == [
        [True, False, True, True, True, True]
    ]
    both, new = merged(chain, some_samples([1], [11], [10.0]), 3, 5)
    assert both.score.tolist() == [[10, 7, 6]]
    assert new.tolist() == [[True, False, False]]


def test_micro_batches_draw_apart_and_are_counted_once(tmp_path: Path) -> None:
    # Two micro-batches of one step that look alike, told apart by their token ids.
    section = replace(
        SECTION, position_bins=1, stratified_per_latent=1, min_per_bin=0, top_per_latent=1, context_tokens=1
    )
    d_sae, size = 300, 8
    part = collector(tmp_path, section, d_sae)
    z = torch.ones(size, d_sae)
    nothing = torch.zeros(size, 1)
    places = torch.arange(size)
    kept = []
    for micro in (0, 1):
        batch = ActivationBatch(nothing, nothing, places + 1 + 100 * micro, places)
        part.collect(SparseCodes.from_dense(z * (1 - 0.5 * micro)), batch, 1, micro)
        kept.append(part._ledger.record()["components"]["activation_samples"]["effect"]["samples_kept"])
    assert part._stores is not None
    top, spread = part._stores
    late = int((spread.token[: 2 * d_sae : 2] > 100).sum())
    # With the same keys every draw of the second micro-batch would tie with the first's, and lose.
    assert 100 < late < 200
    assert not bool((top.token > 100).any())
    assert kept == [2 * d_sae, 2 * d_sae + late]


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_forgotten_latent_has_the_samples_of_its_new_life_alone(backend: str, tmp_path: Path) -> None:
    text = Text(20, 5)
    with use_backend(backend):
        part = collected(tmp_path / "old", text)
        part.forget(torch.tensor([3]))
        part.save(1, words)
        before = rows_of(tmp_path / "old")
        assert {row["latent"] for row in before} == set(part.latents.tolist()) - {3}
        for codes, batch in text.batches(100):
            part.collect(codes.with_values(codes.values / 2), batch, 99)
        part.save(2, words)
        fresh = collector(tmp_path / "fresh")
        for codes, batch in text.batches(100):
            fresh.collect(codes.with_values(codes.values / 2), batch, 99)
        fresh.save(2, words)
    mine, theirs = ([r for r in rows_of(tmp_path / name) if r["latent"] == 3] for name in ("old", "fresh"))
    assert mine
    assert mine == theirs


def test_processes_draw_apart(tmp_path: Path) -> None:
    section = replace(SECTION, position_bins=1, stratified_per_latent=1, min_per_bin=0, context_tokens=1)
    nothing, places = torch.zeros(8, 1), torch.arange(8)
    drawn = []
    for rank in (0, 1):
        part = collector(tmp_path, section, 300)
        part._rank = rank  # what a process of that rank has
        part.collect(
            SparseCodes.from_dense(torch.ones(8, 300)), ActivationBatch(nothing, nothing, places + 1, places), 1
        )
        assert part._stores is not None
        drawn.append(part._stores[1].token[::2, 0])
    # Equal keys would draw the same of eight tokens for every latent; apart they agree on an eighth.
    assert float((drawn[0] == drawn[1]).double().mean()) < 0.25


def tree_bytes(tree: object) -> int:
    """Bytes of a state: tensors as they are, everything else as text."""
    if isinstance(tree, Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, dict):
        return sum(tree_bytes(value) for value in tree.values())
    return len(json.dumps(tree))


@pytest.mark.parametrize("section", [SECTION, replace(SECTION, max_sink_fraction=0.0, stratified_per_latent=3)])
def test_the_state_stays_below_its_bound(section: SamplesSection, tmp_path: Path) -> None:
    bound = collector(tmp_path, section).state_bytes_at_most()
    full = collected(tmp_path, Text(20, 20), section)
    assert tree_bytes(full.state_dict()) <= bound == full.state_bytes_at_most()
    assert tree_bytes(full.state_dict()) > 0.95 * bound
    assert tree_bytes(collector(tmp_path, section).state_dict()) <= bound


def test_a_file_that_cannot_be_written_leaves_both_former_ones(tmp_path: Path) -> None:
    text = Text(20, 21)
    part = collected(tmp_path, text)
    files = part.save(8, words)
    before = [file.read_bytes() for file in files]
    codes, batch = text.batches(100)[0]
    part.collect(codes, batch, 9)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))  # what a full disk does to a write, without filling one
    try:
        with pytest.raises(OSError, match="File too large"):
            part.save(9, words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.read_bytes() for file in files] == before
    assert sorted(files[0].parent.iterdir()) == files
    part.save(9, words)
    assert json.loads(files[1].read_text())["step"] == 9
