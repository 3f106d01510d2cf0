"""Cross-entropy with the transcoder in the layer's place: 1 for the layer itself, 0 for nothing, sinks left as they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from transcoder import RunConfig, Transcoder, TranscoderConfig
from transcoder.activations import ActivationStream, build_stream, cache_activations
from transcoder.training.evaluation import cross_entropy

SMALL = {
    "activations.buffer_tokens": 4096,
    "activations.prefetch": 0,
    "training.batch_size": 256,
    "training.evaluation_tokens": 512,
    "logging.progress": False,
}
TOKENS = 2048


@pytest.fixture(scope="module")
def stream() -> Iterator[ActivationStream]:
    opened = build_stream(RunConfig.load("demo", SMALL), torch.device("cpu"))
    yield opened
    opened.close()


class Given(Transcoder):
    """A transcoder that gives what it is told."""

    def __init__(self, d: int, answer: Tensor | None) -> None:
        super().__init__(TranscoderConfig(d_in=d, d_out=d, d_sae=4, k=1))
        self.answer = answer

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        return torch.zeros_like(x) if self.answer is None else self.answer.expand_as(x)


@pytest.mark.slow
def test_nothing_recovers_nothing_and_noise_less(stream: ActivationStream) -> None:
    nothing = Given(stream.d_in, None).train()
    figures = cross_entropy(nothing, stream, TOKENS)
    assert nothing.training
    assert figures["evaluation/ce_zero"] > figures["evaluation/ce_model"] > 1
    # Sinks keep the layer's own output, so nothing elsewhere is a little better than nothing anywhere.
    assert figures["evaluation/ce_recovered"] == pytest.approx(0, abs=0.1)
    noise = Given(stream.d_in, 50 * torch.randn(stream.d_in, generator=torch.Generator().manual_seed(0)))
    assert cross_entropy(noise, stream, TOKENS)["evaluation/ce_recovered"] < -0.5


def test_the_layer_itself_recovers_everything(stream: ActivationStream) -> None:
    found = stream.heldout_losses({"model": None, "same": lambda source, target: target}, TOKENS)
    assert found is not None
    assert found["same"] == found["model"]


def test_sinks_keep_their_activations(stream: ActivationStream) -> None:
    model = stream._source.source._model  # type: ignore[attr-defined]
    special = torch.tensor(stream.special_ids)
    outputs: list[tuple[Tensor, Tensor, Tensor]] = []
    inner = model.next_token_losses

    def spy(tokens: Tensor, substitute=None):  # type: ignore[no-untyped-def]
        def watched(source: Tensor, target: Tensor) -> Tensor:
            found = substitute[0](source, target)
            outputs.append((tokens.flatten(), target, found))
            return found

        return inner(tokens, watched if substitute else None)

    model.next_token_losses = spy
    try:
        stream.heldout_losses({"zero": lambda source, target: torch.zeros_like(target)}, TOKENS)
    finally:
        model.next_token_losses = inner
    tokens, target, found = (torch.cat(column) for column in zip(*outputs, strict=True))
    sink = torch.isin(tokens, special)
    assert bool(sink.any())
    assert torch.equal(found[sink], target[sink])
    assert not bool(found[~sink].any())


def test_without_a_language_model_there_is_no_figure(tmp_path: Path) -> None:
    config = RunConfig.load("demo", SMALL)
    cache_activations(config, tmp_path / "cache", tokens=3000, device=torch.device("cpu"))
    cached = RunConfig.load(
        "demo", {**SMALL, "activations.kind": "cached", "activations.cached_path": str(tmp_path / "cache")}
    )
    opened = build_stream(cached, torch.device("cpu"))
    assert cross_entropy(Given(opened.d_in, None), opened, TOKENS) == {}
    opened.close()


def test_few_sequences_at_a_time_give_the_same_losses(
    stream: ActivationStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stream.heldout_losses({"model": None, "zero": lambda _, target: torch.zeros_like(target)}, TOKENS)
    model = stream._source.source._model  # type: ignore[attr-defined]
    monkeypatch.setattr(type(model), "sequences_at_a_time", lambda self, length: 3)
    parts = stream.heldout_losses({"model": None, "zero": lambda _, target: torch.zeros_like(target)}, TOKENS)
    assert whole is not None
    assert parts is not None
    assert parts == {name: pytest.approx(value, rel=0.01) for name, value in whole.items()}
