"""python -m bench.harvest [--model demo] [--source HOOK --target HOOK] [--length 128] [--sequences 32] [--rounds 7]

Tokens per second of the activation stream against the bare model: Hugging Face's own, its forward pass stopped at the same
layer, on the same tokens, in the same dtype. Both take their turns, one pass after the other. The stream's time holds all that
it does: packing, sinks, rows, contexts, the shuffle buffer. It makes its passes inline here (`activations.prefetch 0`); in a
run they are made while training takes steps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import machine
from bench.interleaved_timing import WrongResultError
from bench.results import table
from bench.statistics import mean, whole_ratio
from transcoder import RunConfig
from transcoder.activations.language_model import layer_of
from transcoder.activations.model_name import resolve_model_name
from transcoder.activations.stream import build_stream

PASSES = 4
"""Of a round: what fills the half of the stream's buffer that a refill takes."""


class _Stop(Exception):
    pass


class Bare:
    """A causal language model as transformers loads it, stopped behind the MLP of a layer."""

    def __init__(self, name: str, layer: int, device: torch.device) -> None:
        import transformers

        folder = resolve_model_name(name)
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = self.model.to(device).eval().base_model
        blocks = next(m for m in self.model.children() if isinstance(m, torch.nn.ModuleList) and len(m) > layer)
        blocks[layer].register_forward_hook(self._stop)

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        try:
            self.model(tokens, use_cache=False)
        except _Stop as stop:
            return stop.args[0]
        raise WrongResultError("the bare model did not come to its layer")

    def _stop(self, module: object, inputs: object, output: Any) -> None:
        raise _Stop(output[0] if isinstance(output, tuple) else output)


def measured(settings: dict[str, Any], rounds: int) -> dict[str, Any]:
    """A row for `bench.results`, of a run's `settings`."""
    device = machine.device()
    sequences, length = settings["activations.sequences_per_forward"], settings["activations.sequence_length"]
    tokens = sequences * length
    config = RunConfig.load(
        "demo",
        {
            "training.batch_size": min(1024, tokens),
            "activations.prefetch": 0,
            # A refill takes the rows of PASSES passes, less what is masked.
            "activations.buffer_tokens": 2 * PASSES * tokens,
            "activations.refill_fraction": 0.5,
            "model.device": str(device),
            **settings,
        },
    )
    layer = layer_of(config.activations.source_hook) or 0
    bare = Bare(config.model.name, layer, device)
    with build_stream(config, device, context_tokens=64) as stream:
        _check(config, bare, stream, device)
        stream.look_ahead(1)  # fills the buffer
        text = torch.randint(5, stream.vocab_size, (sequences, length), generator=torch.Generator().manual_seed(0))
        text = text.to(device)

        def passes() -> int:
            for _ in range(PASSES):
                bare(text)
            return PASSES * tokens

        def drawn() -> int:
            # From one refill of the buffer to the next.
            before = stream.counters()["passes"]
            while (made := stream.counters()["passes"] - before) == 0:
                next(stream)
            return int(made) * tokens

        taken: dict[str, list[float]] = {"the bare model": [], "the stream": []}
        works: dict[str, Callable[[], int]] = {"the bare model": passes, "the stream": drawn}
        for number in range(rounds + 1):
            for kind, work in list(works.items())[:: 1 if number % 2 else -1]:
                seconds = _seconds(work)
                if number:
                    taken[kind].append(seconds)
    return {
        "operation": "harvest",
        "shape": f"{config.model.name.rpartition('/')[2]}, {sequences} x {length} tokens, to layer {layer}",
        "of": "the bare model",
        "rounds": rounds,
        "kinds": {
            kind: {
                "seconds_per_step": mean([s * tokens for s in samples]),
                "tokens_per_second": len(samples) / sum(samples),
                "ratio": whole_ratio(samples, taken["the bare model"]),
            }
            for kind, samples in taken.items()
        },
    }


def _seconds(work: Callable[[], int]) -> float:
    """Of one token."""
    _wait()
    start = time.perf_counter()
    tokens = work()
    _wait()
    return (time.perf_counter() - start) / tokens


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _check(config: RunConfig, bare: Bare, stream: Any, device: torch.device) -> None:
    """The residual stream behind the layer is what both compute."""
    from transcoder.activations.language_model import HookedModel

    layer = layer_of(config.activations.source_hook) or 0
    hooks = (f"blocks.{layer}.hook_resid_pre", f"blocks.{layer}.hook_resid_post")
    hooked = HookedModel(config.model.name, *hooks, torch.float32, device, progress=False)
    tokens = torch.arange(2 * 64, device=device).view(2, 64) % stream.vocab_size
    found, expected = hooked.forward(tokens)[1], bare(tokens)
    error = float((found - expected).norm() / expected.norm())
    if not error < 1e-4:
        raise WrongResultError(f"the stream's model: off by {error:.3g} of the norm of the bare model's activations")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.harvest", description=__doc__.splitlines()[2])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--source", default="blocks.2.hook_resid_mid")
    parser.add_argument("--target", default="blocks.2.hook_mlp_out")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    settings = {
        "model.name": options.model,
        "activations.source_hook": options.source,
        "activations.target_hook": options.target,
        "activations.sequence_length": options.length,
        "activations.sequences_per_forward": options.sequences,
    }
    for line in table([measured(settings, options.rounds)]):
        print(line)


if __name__ == "__main__":
    main()
