"""Every layer of a source as one, for a cross-layer transcoder: a row is a token's activations of all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from transcoder.activations.activation_source import ActivationSource
from transcoder.activations.rows import Pass, Substitute
from transcoder.config import RunConfig


class AllLayers(ActivationSource):
    """Source [T, sum of d_in] and target [T, sum of d_out], the layers one after another, of the same tokens. A token is a sink
    by the norm of its whole row.

    Args:
        layers: a source of several layers.
    """

    def __init__(self, config: RunConfig, device: torch.device, layers: ActivationSource) -> None:
        super().__init__(
            config,
            device,
            vocabulary=layers.vocabulary,
            widths=[(sum(d_in for d_in, _ in layers.widths), sum(d_out for _, d_out in layers.widths))],
            sequence_length=layers.sequence_length,
            activation_bytes=[sum(layers.activation_bytes)],
            pad_id=layers.vocabulary.pad_id,
        )
        self._layers = layers
        self.holds_out, self.no_sampling = layers.holds_out, layers.no_sampling

    def identity(self, layer: int) -> dict[str, Any]:
        each = [self._layers.identity(place) for place in range(len(self._layers.widths))]
        hooks = [[one.get("source_hook"), one.get("target_hook")] for one in each]
        d_in, d_out = self.widths[0]
        return {**each[0], "source_hook": None, "target_hook": None, "hooks": hooks, "d_in": d_in, "d_out": d_out}

    def next_pass(self) -> list[Pass]:
        return _joined(self._layers.next_pass())

    def from_start(self, heldout: bool, skip: int = 0) -> Iterator[list[Pass]]:
        return map(_joined, self._layers.from_start(heldout, skip))

    def place(self) -> dict[str, Any]:
        return self._layers.place()

    def seek(self, place: dict[str, Any]) -> None:
        self._layers.seek(place)

    def progress(self, place: dict[str, Any]) -> dict[str, int]:
        return self._layers.progress(place)

    def trains(self, found: Pass) -> Tensor | None:
        return self._layers.trains(found)

    def cursor_bytes_at_most(self) -> int:
        return self._layers.cursor_bytes_at_most()

    def heldout_losses(
        self, substitutes: Mapping[str, Mapping[int, Substitute]], tokens: int
    ) -> dict[str, float] | None:
        """As in the base class, every layer replaced at once: each reads what the layers before it wrote."""
        by_layer = {name: self._by_layer(one[0]) if one else {} for name, one in substitutes.items()}
        return self._layers.heldout_losses(by_layer, tokens)

    def unembedding(self, layer: int) -> Tensor | str:
        return "a latent of a cross-layer transcoder writes into several layers"

    def _by_layer(self, substitute: Substitute) -> dict[int, Substitute]:
        """What stands at each layer. Later layers' sources are zeros then: no latent of theirs writes into this one."""
        widths = self._layers.widths
        seen = [torch.empty(0)] * len(widths)

        def at(place: int) -> Substitute:
            def run(source: Tensor, target: Tensor) -> Tensor:
                seen[place] = source
                later = [source.new_zeros(len(source), d_in) for d_in, _ in widths[place + 1 :]]
                targets = [target.new_zeros(len(target), d_out) for _, d_out in widths]
                targets[place] = target
                found = substitute(torch.cat([*seen[: place + 1], *later], 1), torch.cat(targets, 1))
                return found.split([d_out for _, d_out in widths], 1)[place]

            return run

        return {place: at(place) for place in range(len(widths))}


def _joined(passes: list[Pass]) -> list[Pass]:
    source, target = (torch.cat([getattr(one, name) for one in passes], 1) for name in ("source", "target"))
    return [dataclasses.replace(passes[0], source=source, target=target)]
