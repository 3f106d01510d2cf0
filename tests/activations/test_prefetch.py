from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from transcoder.activations.prefetch import Prefetcher


def counter() -> tuple[Callable[[], int], list[int]]:
    made: list[int] = []

    def produce() -> int:
        made.append(len(made))
        return made[-1]

    return produce, made


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.005)
    return condition()


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_results_come_in_the_order_of_production(depth: int) -> None:
    produce, _ = counter()
    ahead = Prefetcher(produce, depth)
    assert [ahead.next() for _ in range(50)] == list(range(50))
    ahead.close()


def test_it_runs_ahead_by_its_depth_and_no_further() -> None:
    produce, made = counter()
    ahead = Prefetcher(produce, 3)
    assert made == []  # nothing before it is asked for
    ahead.next()
    # 1 taken, 3 waiting.
    assert wait_until(lambda: len(made) == 4)
    time.sleep(0.05)
    assert len(made) == 4
    ahead.close()


def test_it_runs_ahead_until_enough_waits_and_by_no_more_than_one_result() -> None:
    produce, made = counter()
    ahead = Prefetcher(produce, 2, enough=50, weigh=lambda _: 8)
    ahead.next()
    # 1 taken; 7 of 8 waiting weigh 56.
    assert wait_until(lambda: len(made) == 8)
    time.sleep(0.05)
    assert len(made) == 8
    assert [ahead.next() for _ in range(3)] == [1, 2, 3]
    assert wait_until(lambda: len(made) == 11)
    ahead.close()


def test_at_least_its_depth_runs_ahead_whatever_it_weighs() -> None:
    produce, made = counter()
    ahead = Prefetcher(produce, 3, enough=1, weigh=lambda _: 8)
    ahead.next()
    assert wait_until(lambda: len(made) == 4)
    time.sleep(0.05)
    assert len(made) == 4
    ahead.close()


def test_work_overlaps() -> None:
    entered, leave = threading.Event(), threading.Event()
    calls: list[int] = []

    def produce() -> int:
        calls.append(1)
        if len(calls) == 2:
            entered.set()
            leave.wait(10)
        return len(calls)

    ahead = Prefetcher(produce, 2)
    assert ahead.next() == 1
    # The second call is under way while the consumer is free to work.
    assert entered.wait(10)
    leave.set()
    assert ahead.next() == 2
    ahead.close()


@pytest.mark.parametrize("depth", [0, 2])
def test_an_exception_reaches_the_consumer_behind_what_was_made_before_it(depth: int) -> None:
    made: list[int] = []

    def produce() -> int:
        made.append(1)
        if len(made) == 4:
            raise ValueError("the fourth")
        return len(made)

    ahead = Prefetcher(produce, depth)
    assert [ahead.next() for _ in range(3)] == [1, 2, 3]
    with pytest.raises(ValueError, match="the fourth"):
        ahead.next()
    if depth:
        with pytest.raises(ValueError, match="the fourth"):
            ahead.next()
    ahead.close()


def alive() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "activations"]


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_close_ends_the_thread(taken: int) -> None:
    before = len(alive())
    produce, _ = counter()
    ahead = Prefetcher(produce, 2)
    for _ in range(taken):
        ahead.next()
    ahead.close()
    ahead.close()
    assert len(alive()) == before
    with pytest.raises(RuntimeError, match="closed"):
        ahead.next()


def test_the_thread_ends_with_its_owner() -> None:
    before = len(alive())
    produce, _ = counter()
    ahead = Prefetcher(produce, 2)
    ahead.next()
    assert len(alive()) == before + 1
    del ahead
    gc.collect()
    assert wait_until(lambda: len(alive()) == before)


SCRIPT = """
import signal, sys, time
# A shell starts background jobs with interrupts ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
from transcoder.activations.prefetch import Prefetcher
made = []
def produce():
    made.append(1)
    if len(made) > 2:
        time.sleep(0.02 if sys.argv[1] == "exit" else 2)
    return 1
ahead = Prefetcher(produce, 2)
ahead.next()
if sys.argv[1] == "exit":
    print("ready", flush=True)
else:
    try:
        print("ready", flush=True)
        while True:
            ahead.next()
    except KeyboardInterrupt:
        ahead.close()
        print("closed", flush=True)
"""


def test_an_interrupt_gets_through_while_the_consumer_waits() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "interrupt"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert out == "closed\n", err
    assert process.returncode == 0, err


def test_a_program_that_forgets_to_close_still_ends() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "exit"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
