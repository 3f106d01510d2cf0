from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from transcoder.activations.batch import ActivationBatch, batch_of, columns_of, concatenate, take_rows
from transcoder.activations.buffer import ShuffleBuffer, permutation, to_device

CPU = torch.device("cpu")


def rows(first: int, count: int) -> ActivationBatch:
    """Rows that can be told apart by their token id; every other column follows from it."""
    ids = torch.arange(first, first + count)
    return ActivationBatch(
        source=ids[:, None] * torch.ones(3),
        target=-ids[:, None] * torch.ones(2),
        tokens=ids,
        positions=ids % 16,
        sequences=ids // 16,
        weights=ids / 7.0,
        contexts=ids[:, None].to(torch.int32) + torch.arange(4, dtype=torch.int32),
        context_anchor=2,
    )


def drain(buffer: ShuffleBuffer, batches: int, first: int = 0) -> tuple[list[ActivationBatch], int]:
    found = []
    for _ in range(batches):
        if buffer.needs_refill:
            room = buffer.room
            # In uneven pieces, as passes come.
            cut = room // 3
            buffer.refill([rows(first, cut), rows(first + cut, room - cut)])
            first += room
        found.append(buffer.draw())
    return found, first


def test_every_row_is_delivered_once_with_all_its_columns() -> None:
    buffer = ShuffleBuffer(64, 8, 0.5, seed=0)
    batches, produced = drain(buffer, 50)
    seen = concatenate(batches)
    left = buffer.state_dict()["rows"]["tokens"]
    every = torch.cat([seen.tokens, left]).sort().values
    assert torch.equal(every, torch.arange(produced))
    whole = rows(0, produced)
    expected = take_rows(whole, seen.tokens)
    for name in ("source", "target", "positions", "sequences", "weights", "contexts"):
        assert torch.equal(getattr(seen, name), getattr(expected, name))
    assert seen.context_anchor == 2


@pytest.mark.parametrize(("fraction", "expected"), [(0.25, 16), (0.5, 32), (1.0, 64), (0.01, 8)])
def test_a_refill_replaces_only_what_was_drawn(fraction: float, expected: int) -> None:
    buffer = ShuffleBuffer(64, 8, fraction, seed=0)
    buffer.refill([rows(0, 64)])
    while not buffer.needs_refill:
        buffer.draw()
    assert buffer.room == expected


def test_old_rows_mix_with_new_ones() -> None:
    buffer = ShuffleBuffer(256, 32, 0.5, seed=0)
    buffer.refill([rows(0, 256)])
    for _ in range(4):
        buffer.draw()
    buffer.refill([rows(256, 128)])
    new = [int((buffer.draw().tokens >= 256).sum()) for _ in range(4)]
    assert all(6 <= n <= 26 for n in new)


def test_a_batch_draws_from_many_sequences() -> None:
    batches, _ = drain(ShuffleBuffer(256, 32, 0.5, seed=0), 20)
    for batch in batches:
        assert batch.sequences is not None
        assert len(batch.sequences.unique()) >= 8


def test_seed_decides_the_order() -> None:
    first, second, other = (drain(ShuffleBuffer(64, 8, 0.5, seed=s), 10)[0] for s in (0, 0, 1))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a.tokens, b.tokens) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("capacity", [64, 61, 8])
def test_no_refill_takes_more_rows_than_it_says(capacity: int, fraction: float) -> None:
    buffer = ShuffleBuffer(capacity, 8, fraction, seed=0)
    buffer.refill([rows(0, capacity)])
    taken = []
    for _ in range(40):
        if buffer.needs_refill:
            taken.append(buffer.room)
            buffer.refill([rows(0, buffer.room)])
        buffer.draw()
    assert set(taken) == {buffer.refill_rows}


def test_a_refill_and_a_draw_do_not_wait_for_the_device(device: torch.device) -> None:
    buffer = ShuffleBuffer(64, 8, 0.5, seed=0)
    pieces = [batch_of({n: v.to(device) for n, v in columns_of(rows(i, 32)).items()}, 2) for i in (0, 32)]
    buffer.refill(pieces)
    for _ in range(4):
        buffer.draw()
    with no_sync(device):
        buffer.refill(pieces[:1])
        batch = buffer.draw()
    assert batch.tokens.device.type == device.type


def test_a_copy_from_the_host_is_pinned_and_queued() -> None:
    copied: list[tuple[torch.device, bool]] = []

    class Host(torch.Tensor):
        """Notes how it is copied; there may be no CUDA here to copy it to."""

        pinned = False

        def pin_memory(self, *_: object, **__: object) -> Host:
            self.pinned = True
            return self

        def to(self, device: torch.device, *, non_blocking: bool = False) -> Host:  # type: ignore[override]
            copied.append((device, self.pinned and non_blocking))
            return self

    host = torch.arange(3).as_subclass(Host)
    to_device(host, torch.device("cuda", 0))
    assert copied == [(torch.device("cuda", 0), True)]
    plain = torch.arange(3)
    assert to_device(plain, CPU) is plain


@contextmanager
def no_sync(device: torch.device) -> Iterator[None]:
    """An error where the host waits for CUDA; nothing on the CPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 7, 11])
def test_a_saved_buffer_goes_on_bitwise(stop: int) -> None:
    buffer = ShuffleBuffer(64, 8, 0.5, seed=3)
    _, first = drain(buffer, stop)
    state = buffer.state_dict()
    again = ShuffleBuffer(64, 8, 0.5, seed=3)
    again.load_state_dict(state, CPU)
    expected, _ = drain(buffer, 30, first)
    found, _ = drain(again, 30, first)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.source, b.source)


def test_the_state_is_a_copy() -> None:
    buffer = ShuffleBuffer(64, 8, 0.5, seed=3)
    _, first = drain(buffer, 3)
    state = buffer.state_dict()
    before = {name: value.clone() for name, value in state["rows"].items()}
    drain(buffer, 20, first)
    assert all(torch.equal(before[name], value) for name, value in state["rows"].items())


def test_drawn_batches_are_not_overwritten_by_a_refill() -> None:
    buffer = ShuffleBuffer(64, 8, 0.5, seed=3)
    (batch,), first = drain(buffer, 1)
    before = batch.source.clone()
    drain(buffer, 20, first)
    assert torch.equal(batch.source, before)


def test_wrong_sizes_are_refused() -> None:
    buffer = ShuffleBuffer(64, 8, 0.5, seed=0)
    with pytest.raises(ValueError, match="expected at least 64 rows, got 63"):
        buffer.refill([rows(0, 63)])
    assert [len(rest) for rest in buffer.refill([rows(0, 60), rows(60, 10), rows(70, 3)])] == [6, 3]
    small = ShuffleBuffer(32, 8, 0.5, seed=0)
    with pytest.raises(ValueError, match="holds 64 tokens and this one has room for 32"):
        small.load_state_dict(buffer.state_dict(), CPU)


def test_permutations_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first = permutation(100, "a", 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, permutation(100, "a", 1))
    assert not torch.equal(first, permutation(100, "a", 2))
    assert torch.equal(first.sort().values, torch.arange(100))
