"""ProgressBar: a bar on a terminal, sparse lines in a log."""

from __future__ import annotations

import io
import re

from transcoder.reporting import ProgressBar
from transcoder.reporting.format import clock, number, percent, thousands
from transcoder.reporting.progress import metrics_text

METRICS = {
    "losses/overall_loss": 0.53124,
    "metrics/fvu": 0.412,
    "metrics/l0": 16.0,
    "sparsity/dead_share": 0.0213,
    "duplicates/pairs": 17.0,
    "duplicates/flagged": 3.0,
    "metrics/tokens_per_second": 41234.0,
}
TEXT = "loss 0.531  FVU 0.412  L0 16  dead 2.1%  candidate pairs 17  41.2k tok/s"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_figures_leave_out_what_is_unknown() -> None:
    assert metrics_text(METRICS) == TEXT
    shares = {"time/language_model_share": 0.614, "time/transcoder_share": 0.34, "time/antidup_share": 0.041}
    assert metrics_text(shares) == "time model 61%, transcoder 34%, anti-dup 4%"
    assert metrics_text({}) == ""
    assert metrics_text({"metrics/fvu": float("nan"), "duplicates/pairs": 2}) == "FVU nan  candidate pairs 2"
    assert metrics_text({"sparsity/dead_share": float("inf")}) == "dead inf%"


def test_numbers_for_people() -> None:
    assert [thousands(v) for v in (7, 999, 1234, 4.2e6, 3e9, float("nan"))] == [
        "7",
        "999",
        "1.23k",
        "4.2M",
        "3G",
        "?",
    ]
    values = (None, 0.123456, 18432.0, 1.2e9, 0.00001234, 0, 23456.7, 1523.4, 10**400, float("inf"))
    assert [number(v) for v in values] == [
        "–",
        "0.1235",
        "18,432",
        "1.2G",
        "1.23e-05",
        "0",
        "23,457",
        "1,523",
        "not finite",
        "not finite",
    ]
    assert [percent(v) for v in (None, 0.0213, 0, 1, 0.9999)] == ["–", "2.1 %", "0 %", "100 %", "100 %"]
    assert [clock(v) for v in (0, 59.9, 61, 3671, float("inf"))] == ["0:00", "0:59", "1:01", "1:01:11", "?"]


def test_a_log_gets_the_first_the_last_and_few_lines_between() -> None:
    log = io.StringIO()
    bar = ProgressBar(1000, stream=log, plain_seconds=3600)
    for step in range(10, 1001, 10):
        bar.update(step, METRICS if step == 10 else {"metrics/l0": 15.0})
    bar.close()
    first, last = log.getvalue().splitlines()
    assert first.startswith(f"step 10/1000 (1%)  {TEXT}  elapsed 0:00  left ")
    assert last.startswith("step 1000/1000 (100%)  loss 0.531")
    assert "L0 15" in last
    assert last.endswith("left 0:00")
    assert "\r" not in log.getvalue()


def test_an_interrupted_run_ends_with_its_last_figures() -> None:
    log = io.StringIO()
    bar = ProgressBar(1000, initial=500, stream=log, plain_seconds=3600)
    bar.update(510, METRICS)
    bar.update(520, {"metrics/fvu": 0.3})
    bar.close()
    bar.close()
    assert [re.match(r"step (\d+)/", line)[1] for line in log.getvalue().splitlines()] == ["510", "520"]  # type: ignore[index]
    assert "FVU 0.3 " in log.getvalue()


def test_a_terminal_gets_one_bar() -> None:
    screen = Terminal()
    bar = ProgressBar(100, initial=40, stream=screen)
    bar.update(50, METRICS)
    bar.update(100, METRICS)
    bar.close()
    assert "100/100" in screen.getvalue()
    assert "41.2k tok/s" in screen.getvalue()
    assert "\r" in screen.getvalue()
    assert screen.getvalue().count("\n") == 1


def test_disabled_is_silent() -> None:
    for stream in (io.StringIO(), Terminal()):
        bar = ProgressBar(10, enabled=False, stream=stream)
        bar.update(10, METRICS)
        bar.close()
        assert stream.getvalue() == ""
