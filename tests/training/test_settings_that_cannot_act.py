"""Settings that wait for more than the run has are named before the first step, each with a value that would act; defaults act
within the run, whatever its length."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from transcoder.config import RunConfig
from transcoder.training import start_checks
from transcoder.training.start_checks import as_started, check_switches

WARNING = re.compile(r"^(\S+) is \d+.*?(\d+) would act$", re.DOTALL)
NO_FOLDER = Path("no such folder")


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
            "training.dead_refresh_steps": st.integers(1, 20_000),
            "transcoder.activation": st.sampled_from(["batch_topk", "jumprelu"]),
            "transcoder.jumprelu.warmup_steps": st.integers(0, 20_000),
            "transcoder.dead_after_tokens": st.integers(1, 10**8),
            "antidup.monitor.block_tokens": st.integers(1, 10**8),
            "antidup.monitor.blocks_to_flag": st.integers(1, 4),
            "antidup.monitor.correlation_save_frequency": st.integers(1, 20_000),
            "antidup.monitor.update_every": st.integers(1, 1000),
            "antidup.samples.collect_every": st.integers(1, 20_000),
            "antidup.regularizer.orthogonality_weight": st.sampled_from([0, 0.01]),
            "antidup.regularizer.orthogonality_every": st.integers(1, 20_000),
            "antidup.recycle.enabled": st.booleans(),
            "antidup.recycle.every": st.integers(1, 20_000),
        }
    )
)
def test_the_values_named_would_act(values: dict[str, int]) -> None:
    values = {**values, "activations.buffer_tokens": 8192}
    config = RunConfig.load("demo", values)
    found = named(config)
    steps = values["training.steps"]
    tokens = steps * values["training.batch_size"] * values["training.accumulation"]
    late = {
        "training.warmup_steps": values["training.warmup_steps"] > steps,
        "training.evaluation_every": values["training.evaluation_every"] > steps,
        "training.dead_refresh_steps": values["training.dead_refresh_steps"] >= steps,
        "antidup.samples.collect_every": values["antidup.samples.collect_every"] >= steps,
        "antidup.recycle.every": values["antidup.recycle.enabled"] and values["antidup.recycle.every"] > 0.8 * steps,
    }
    assert {name for name in late if name in found} == {name for name, is_late in late.items() if is_late}
    if values["transcoder.dead_after_tokens"] > tokens:
        assert "transcoder.dead_after_tokens" in found
    if values["antidup.monitor.block_tokens"] * values["antidup.monitor.blocks_to_flag"] > tokens:
        assert "antidup.monitor.block_tokens" in found
    assert named(config.replace(found)) == {}


@settings(deadline=None)
@given(
    st.integers(40, 20_000),
    st.integers(1, 4096),
    st.integers(1, 4),
    st.sampled_from(["batch_topk", "topk", "jumprelu"]),
)
def test_defaults_act_within_the_run(steps: int, batch: int, accumulation: int, activation: str) -> None:
    values = {"training.steps": steps, "training.batch_size": batch, "training.accumulation": accumulation}
    config = RunConfig().replace({**values, "transcoder.activation": activation})
    resolved = as_started(config, NO_FOLDER, resume=False)
    found = named(resolved)
    # Reports every 100 steps are too rare in a run of a few hundred.
    assert set(found) <= {"antidup.monitor.correlation_save_frequency"}
    assert named(resolved.replace(found)) == {}
    tokens = steps * batch * accumulation
    assert resolved.training.warmup_steps == min(100, steps // 10)
    assert resolved.transcoder.dead_after_tokens == max(1, min(10_000_000, tokens // 4))
    assert resolved.antidup.monitor.block_tokens == max(1, min(4_000_000, tokens // 6))


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"training.steps": 2, "training.warmup_steps": 0}, {"training.steps": 3}),
        ({"antidup.recycle.enabled": True, "antidup.recycle.until": 0.02}, {"training.steps": 150}),
        ({"checkpoint.every": 40, "checkpoint.keep_every": 30}, {"checkpoint.keep_every": 40}),
        ({"checkpoint.every": 20, "checkpoint.keep_every": 30}, {}),
        ({"checkpoint.every": 200, "checkpoint.keep_every": 50}, {}),
        ({"transcoder.aux_k": 0, "training.dead_refresh_steps": 1000}, {}),
    ],
)
def test_too_few_steps_for_a_flag_and_other_single_settings(values: dict[str, float], found: dict[str, int]) -> None:
    short = {
        "training.steps": 100,
        "training.dead_refresh_steps": 1,
        "antidup.recycle.every": 1,
        "antidup.samples.collect_every": 1,
        "antidup.monitor.correlation_save_frequency": 1,
    }
    config = as_started(RunConfig().replace({**short, **values}), NO_FOLDER, resume=False)
    assert named(config) == found
    assert named(as_started(config.replace(found), NO_FOLDER, resume=False)) == {} or values.get(
        "antidup.recycle.enabled"
    )


def test_the_readmes_example_can_count_a_dead_latent_and_flag_a_pair() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(name: my-run.*?)```", text, re.DOTALL)
    config = as_started(RunConfig.from_dict(yaml.safe_load(example)), NO_FOLDER, resume=False)
    assert named(config) == {}


def test_a_resumed_run_keeps_what_its_length_gave(tmp_path: Path) -> None:
    started = as_started(RunConfig().replace({"training.steps": 60}), tmp_path, resume=False)
    (tmp_path / "config.yaml").write_text(started.to_yaml())
    longer = as_started(RunConfig().replace({"training.steps": 600}), tmp_path, resume=True)
    assert longer == started.replace({"training.steps": 600})
    # A number that is given counts.
    given = RunConfig().replace({"training.warmup_steps": 3})
    assert as_started(given, tmp_path, resume=True).training.warmup_steps == 3
