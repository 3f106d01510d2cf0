"""Parts of the correlation statistics that act on a GPU only, as far as a machine without one can hold them to
account."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from transcoder.kernels.correlation import async_scalar, torch_backend


def test_the_event_is_recorded_on_the_stream_of_the_sizes_device(monkeypatch: pytest.MonkeyPatch) -> None:
    # The driver is played by stand-ins: a machine needs two GPUs to show the difference.
    recorded: list[object] = []

    class Event:
        def record(self, stream: object = "current device") -> None:
            recorded.append(stream)

        def synchronize(self) -> None:
            recorded.append("waited")

    def empty(*size: object, dtype: torch.dtype, device: str, pin_memory: bool) -> torch.Tensor:
        # Only memory of the host can be pinned, whatever the default device.
        assert pin_memory
        assert device == "cpu"
        return torch.empty(*size, dtype=dtype)  # type: ignore[call-overload]

    cuda = SimpleNamespace(Event=Event, current_stream=lambda device: ("stream of", device))
    monkeypatch.setattr(async_scalar, "torch", SimpleNamespace(empty=empty, int64=torch.int64, cuda=cuda))
    size = async_scalar.DeferredSize(torch.tensor(7))
    assert recorded == [("stream of", torch.device("cpu"))]
    assert size.read() == 7
    assert recorded[-1] == "waited"


def test_pages_are_larger_on_a_gpu() -> None:
    assert torch_backend.page_pairs(torch.device("cpu")) == torch_backend.PAGE_PAIRS
    assert torch_backend.page_pairs(torch.device("cuda:1")) == torch_backend.GPU_PAGE_PAIRS == 1 << 22
