"""Settings that wait for more than the run has are named before the first step, each with a value that would act."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transcoder.config import RunConfig
from transcoder.training import start_checks
from transcoder.training.start_checks import check_switches

WARNING = re.compile(r"^(\S+) is \d+.*?(\d+) would act$", re.DOTALL)


def named(config: RunConfig) -> dict[str, int]:
    """{setting: the value that would act} of each warning."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start_checks.logger, "handle", lambda record: said.append(record.getMessage()))
        check_switches(config, None, None)
    found = [match for match in map(WARNING.match, said) if match]
    assert len(found) == len(said)
    return {match[1]: int(match[2]) for match in found}


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "training.steps": st.integers(10, 10_000),
            "training.batch_size": st.integers(1, 4096),
            "training.accumulation": st.integers(1, 4),
            "training.warmup_steps": st.integers(0, 20_000),
            "training.evaluation_every": st.integers(0, 20_000),
            "transcoder.dead_after_tokens": st.integers(1, 10**8),
            "antidup.monitor.block_tokens": st.integers(1, 10**8),
            "antidup.monitor.blocks_to_flag": st.integers(1, 4),
        }
    )
)
def test_the_values_named_would_act(values: dict[str, int]) -> None:
    values = {**values, "activations.buffer_tokens": 8192}
    config = RunConfig.load("demo", values)
    found = named(config)
    steps = values["training.steps"]
    tokens = steps * values["training.batch_size"] * values["training.accumulation"]
    blocks = values["antidup.monitor.blocks_to_flag"]
    late = {
        "training.warmup_steps": values["training.warmup_steps"] > steps,
        "training.evaluation_every": values["training.evaluation_every"] > steps,
        "transcoder.dead_after_tokens": values["transcoder.dead_after_tokens"] >= tokens,
        "antidup.monitor.block_tokens": values["antidup.monitor.block_tokens"] * blocks > tokens,
    }
    assert set(found) == {name for name, is_late in late.items() if is_late}
    assert named(config.replace(found)) == {}
