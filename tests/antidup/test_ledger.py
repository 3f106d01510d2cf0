"""The ledger stops a run whose enabled parts were not really used, by name."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

from transcoder.antidup import LedgerError, UsageLedger
from transcoder.antidup.ledger import REQUIRED_EFFECTS

ALL = dict.fromkeys(REQUIRED_EFFECTS, True)


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


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_an_effect_that_is_nothing_is_no_effect(tmp_path: Path, value: float) -> None:
    ledger = used(tmp_path, without="diversity_regularizer.gradient_norm")
    ledger.record_effect("diversity_regularizer", gradient_norm=torch.tensor(value))
    with pytest.raises(LedgerError, match="diversity_regularizer: no effect \\(gradient_norm is"):
        ledger.verify(1)
    ledger.write()


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
