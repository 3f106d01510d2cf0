"""The ledger stops a run whose enabled parts were not really used, by name."""

from __future__ import annotations

import json
import resource
import threading
from pathlib import Path

import pytest
import torch

from transcoder.antidup import LedgerError, UsageLedger
from transcoder.usage import REQUIRED_EFFECTS, TERM_UNITS, missing_effects

ALL = dict.fromkeys(REQUIRED_EFFECTS, True)
TERMS = {f"{term}_{what}": 3 for term, unit in TERM_UNITS.items() for what in ("evaluations", unit)}


def used(path: Path, without: str = "") -> UsageLedger:
    """A ledger in which every part has everything, but for `without` = 'part', 'part.calls', 'part.key' or
    'part.files'."""
    ledger = UsageLedger(ALL, path / "usage.json")
    for name, keys in REQUIRED_EFFECTS.items():
        if without != f"{name}.calls":
            ledger.record_call(name)
        for key in keys:
            if without != f"{name}.{key}":
                ledger.record_effect(name, **{key: torch.tensor(2.0)})
        if without != f"{name}.files":
            file = path / f"{name}.json"
            file.write_text("{}")
            ledger.record_file(name, file)
    ledger.record_effect("diversity_regularizer", **TERMS)
    ledger.record_survey()
    return ledger


def test_everything_used_passes_and_writes_the_record(tmp_path: Path) -> None:
    ledger = used(tmp_path)
    ledger.record_effect("position_sampler", positions_resampled=3, positions_seen=torch.tensor(10))
    ledger.verify(5)
    record = json.loads(ledger.write().read_text())
    assert list(record) == ["components"]
    assert list(record["components"]) == list(REQUIRED_EFFECTS)
    assert record["components"]["position_sampler"] == {
        "enabled": True,
        "calls": 1,
        "effect": {"positions_resampled": 5.0, "positions_seen": 10.0},
        "files": ["position_sampler.json"],
    }
    assert list(tmp_path.glob("*.tmp")) == []


@pytest.mark.parametrize(
    ("lack", "said"),
    [
        *((f"{name}.calls", "no calls") for name in REQUIRED_EFFECTS),
        *((f"{name}.files", "no files") for name in REQUIRED_EFFECTS),
        *((f"{name}.{key}", f"{key} was never recorded") for name, keys in REQUIRED_EFFECTS.items() for key in keys),
    ],
)
def test_each_missing_thing_is_named(tmp_path: Path, lack: str, said: str) -> None:
    part = lack.split(".")[0]
    with pytest.raises(LedgerError, match=f"by step 100: {part}: .*{said}") as caught:
        used(tmp_path, without=lack).verify(100)
    assert [name for name in REQUIRED_EFFECTS if name in str(caught.value)] == [part]


@pytest.mark.parametrize(
    ("effect", "value"),
    [
        ("diversity_regularizer.gradient_norm", float("nan")),
        ("diversity_regularizer.penalty", float("inf")),
        ("activation_samples.samples_kept", 0.0),
    ],
)
def test_an_effect_that_is_nothing_is_no_effect(tmp_path: Path, effect: str, value: float) -> None:
    ledger = used(tmp_path, without=effect)
    name, key = effect.split(".")
    ledger.record_effect(name, **{key: torch.tensor(value)})
    with pytest.raises(LedgerError, match=f"{name}: no effect \\({key} is"):
        ledger.verify(1)
    ledger.write()


def evaluated(**changes: float) -> dict[str, float]:
    """A regularizer's effects when it found nothing to penalise."""
    return {"penalty": 0.0, "gradient_norm": 0.0, **TERMS, "surveys": 2, **changes}


@pytest.mark.parametrize(
    ("effect", "said"),
    [
        (evaluated(), None),
        (evaluated(correlation_pairs=0), None),
        (evaluated(correlation_pairs=0, surveys=0), "correlation term was evaluated on 0 pairs and the monitor never"),
        (
            evaluated(correlation_evaluations=0, correlation_pairs=0),
            "correlation term was never evaluated: it was given",
        ),
        (evaluated(orthogonality_evaluations=0), "orthogonality term was never evaluated"),
        (evaluated(orthogonality_rows=0), "orthogonality term was evaluated on 0 rows"),
        (evaluated(all_pairs_entries=0), "all_pairs term was evaluated on 0 entries"),
        (evaluated(position_entropy_entries=float("nan")), "position_entropy term was evaluated on 0 entries"),
        ({"penalty": 0.0, "gradient_norm": 0.0}, "no penalty term of weight above 0 was recorded"),
        ({"penalty": 0.0, "gradient_norm": 0.0, "orthogonality_evaluations": 1, "orthogonality_rows": 9}, None),
    ],
)
def test_a_penalty_may_be_nothing_but_its_terms_must_have_looked(effect: dict[str, float], said: str | None) -> None:
    missing = missing_effects("diversity_regularizer", effect)
    if said is None:
        assert missing == []
    else:
        assert len(missing) == 1
        assert said in missing[0]


def test_nothing_to_penalise_passes_and_is_said(tmp_path: Path) -> None:
    ledger = UsageLedger({**dict.fromkeys(ALL, False), "diversity_regularizer": True}, tmp_path / "usage.json")
    ledger.record_call("diversity_regularizer")
    ledger.record_effect(
        "diversity_regularizer",
        penalty=torch.tensor(0.0),
        gradient_norm=0.0,
        orthogonality_evaluations=10,
        orthogonality_rows=2560,
        correlation_evaluations=100,
        correlation_pairs=0,
    )
    (tmp_path / "regularizer.jsonl").write_text("{}")
    ledger.record_file("diversity_regularizer", tmp_path / "regularizer.jsonl")
    with pytest.raises(LedgerError, match="diversity_regularizer: the correlation term was evaluated on 0 pairs"):
        ledger.verify(100)
    assert ledger.surveys == 0
    ledger.record_survey()
    ledger.record_survey()
    assert ledger.surveys == 2
    ledger.verify(100)
    effect = json.loads(ledger.write().read_text())["components"]["diversity_regularizer"]["effect"]
    assert effect.pop("finding") == (
        "nothing to penalise: correlation was evaluated 100 times over 0 pairs; orthogonality was evaluated 10 times over "
        "2560 rows; 2 surveys looked for pairs"
    )
    assert all(isinstance(value, float) for value in effect.values())
    again = UsageLedger(ALL, tmp_path / "usage.json")
    again.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert again.surveys == 2


def test_a_write_that_fails_leaves_the_former_file(tmp_path: Path) -> None:
    ledger = used(tmp_path)
    before = ledger.write().read_text()
    ledger.record_call("correlation_monitor")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))  # what a full disk does to a write, without filling one
    try:
        with pytest.raises(OSError, match="File too large"):
            ledger.write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ledger.path.read_text() == before
    assert list(tmp_path.glob("*.tmp")) == []
    assert json.loads(ledger.write().read_text())["components"]["correlation_monitor"]["calls"] == 2


def test_files_must_exist_and_hold_bytes(tmp_path: Path) -> None:
    ledger = used(tmp_path)
    (tmp_path / "activation_samples.json").unlink()
    (tmp_path / "correlation_monitor.json").write_text("")
    with pytest.raises(LedgerError) as caught:
        ledger.verify(1)
    assert "activation_samples: file activation_samples.json is not there" in str(caught.value)
    assert "correlation_monitor: file correlation_monitor.json is empty" in str(caught.value)


def test_a_part_that_is_off_owes_nothing(tmp_path: Path) -> None:
    ledger = UsageLedger(dict.fromkeys(REQUIRED_EFFECTS, False), tmp_path / "usage.json")
    ledger.verify(1)
    parts = json.loads(ledger.write().read_text())["components"]
    assert all(p == {"enabled": False, "calls": 0, "effect": {}, "files": []} for p in parts.values())


def test_state_survives_a_resume(tmp_path: Path) -> None:
    first = used(tmp_path)
    first.record_effect("correlation_monitor", pairs_seen=torch.tensor(0.1, dtype=torch.float64))
    second = UsageLedger(ALL, tmp_path / "usage.json")
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.record() == first.record()
    second.record_effect("correlation_monitor", pairs_seen=torch.tensor(1))
    assert second.record()["components"]["correlation_monitor"]["effect"]["pairs_seen"] == 3.1


def test_totals_do_not_alias_what_was_recorded(tmp_path: Path) -> None:
    ledger = UsageLedger(ALL, tmp_path / "usage.json")
    value = torch.tensor(1.0, dtype=torch.float64)
    ledger.record_effect("activation_samples", samples_kept=value)
    value += 5
    assert ledger.record()["components"]["activation_samples"]["effect"]["samples_kept"] == 1.0


def test_threads_lose_no_call(tmp_path: Path) -> None:
    ledger = UsageLedger(ALL, tmp_path / "usage.json")

    def work() -> None:
        for _ in range(300):
            ledger.record_call("position_sampler")
            ledger.record_effect("position_sampler", positions_resampled=torch.tensor(1))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    part = ledger.record()["components"]["position_sampler"]
    assert part["calls"] == 1200
    assert part["effect"]["positions_resampled"] == 1200


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown: banana, missing: activation_samples"):
        UsageLedger({**{k: True for k in ALL if k != "activation_samples"}, "banana": True}, tmp_path / "usage.json")
    with pytest.raises(ValueError, match="got 'banana'"):
        UsageLedger(ALL, tmp_path / "usage.json").record_call("banana")
