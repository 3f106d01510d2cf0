"""Layer sets: which layers a run trains, the hooks of each, and the settings in which they differ."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from transcoder.settings import ConfigError, Section, convert, refusal

LAYERS = "activations.layers"
LAYERS_FOLDER = "layers"
"""In a set's run folder: the run folders of its layers."""
EXPECTED = "layers such as 8, 0-25, [2, 3], all, or a list of [source hook, target hook]"
PLACE = "{layer}"
MOST = 10_000
"""Layer numbers are below this."""


class LayerHooks(NamedTuple):
    """A layer of a run and its hooks; `layer` is None in a run of one pair of hooks, which is no set."""

    layer: int | None
    source: str
    target: str


def parse_layers(value: Any) -> Any:
    """`activations.layers` as it is kept: None, "all", a tuple of layer numbers in order, or a tuple of pairs of hooks (lists).

    Raises:
        ConfigError: anything else, a layer below 0 or given twice, no layer at all.
    """
    if value is None or value == "all":
        return value
    parts = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if parts and all(isinstance(part, (list, tuple)) for part in parts):
        pairs = [tuple(part) for part in parts]
        if any(len(pair) != 2 or not all(isinstance(hook, str) for hook in pair) for pair in pairs):
            raise refusal(LAYERS, EXPECTED, value)
        found: list[Any] = [list(pair) for pair in pairs]
        numbers = [_layer_of_pair(pair) for pair in pairs]
    else:
        found = numbers = sorted(number for part in parts for number in _numbers(part, value))
    repeated = sorted({number for number in numbers if numbers.count(number) > 1})
    if not numbers or repeated:
        raise refusal(LAYERS, f"each layer once{f', not {repeated} again' if repeated else ', at least one'}", value)
    return tuple(found)


def layer_hooks(layers: Any, source_hook: str, target_hook: str) -> list[LayerHooks]:
    """The hooks of each layer of `parse_layers`'s result, by layer; without layers the two hooks as they are.

    `{layer}` in a hook's name stands for the layer's number; in a name without it, its own layer number is that place.

    Raises:
        ConfigError: a name without a place for the number, or "all", which only a model or a cache can resolve.
    """
    if layers is None:
        return [LayerHooks(None, source_hook, target_hook)]
    if layers == "all":
        raise ConfigError(f"{LAYERS}: 'all' is not resolved: `resolved_layers` asks the model how many there are")
    if isinstance(layers[0], list):
        return sorted(LayerHooks(_layer_of_pair(pair), *pair) for pair in layers)
    return [
        LayerHooks(n, _at_layer("source_hook", source_hook, n), _at_layer("target_hook", target_hook, n))
        for n in layers
    ]


def layer_values(config: Any) -> dict[int, dict[str, Any]]:
    """{layer: {dotted name: value}}: where the settings of each layer's run differ from the set's. Empty without layers.

    Raises:
        ConfigError: see `layer_hooks` and `PerLayerSection.values`; values by layer without layers; or a cross-layer transcoder
            that cannot be.
    """
    section, widths = config.activations, config.transcoder.widths
    if section.cross_layer:
        _check_cross_layer(config)
    if section.layers == "all":
        return {}
    if section.layers is None and config.per_layer.given:
        raise ConfigError(f"per_layer: gives {', '.join(config.per_layer.given)} by layer, and {LAYERS} is not set")
    pairs = [pair for pair in section.pairs if pair.layer is not None]
    found = config.per_layer.values([int(pair.layer or 0) for pair in pairs])
    for layer, source, target in pairs:
        own = found[int(layer or 0)]
        if "transcoder.d_sae" in own and widths is not None:
            own["transcoder.widths"] = [width * own["transcoder.d_sae"] // config.transcoder.d_sae for width in widths]
        own |= {"activations.source_hook": source, "activations.target_hook": target}
    return found


def _check_cross_layer(config: Any) -> None:
    kinds = "batch_topk or jumprelu, since a latent must be judged before later layers are known,"
    refused = {
        f"{LAYERS}: expected layers such as all": config.activations.layers is None,
        f"transcoder.activation: expected {kinds}": config.transcoder.activation == "topk",
        "transcoder.skip: expected false": config.transcoder.skip,
        "antidup.recycle.enabled: expected false": config.antidup.recycle.enabled,
        "training.init_from: expected null": config.training.init_from is not None,
        "per_layer: expected nothing": bool(config.per_layer.given),
    }
    for text, wrong in refused.items():
        if wrong:
            raise ConfigError(f"{text} with activations.cross_layer")


def layer_configs(config: Any, buffer_tokens: int) -> dict[int, Any]:
    """The config of each layer's run, by layer: one pair of hooks, the layer's own values, a name that ends in the layer.

    Args:
        config: a `RunConfig`; the values are too (config.py imports this file).
        buffer_tokens: where the config leaves it open.
    """
    shared = {
        "activations.layers": None,
        "activations.buffer_tokens": config.activations.buffer_tokens or buffer_tokens,
        # The set has one progress bar, and one run at W&B.
        "logging.progress": False,
        "logging.wandb": "off",
        "logging.tensorboard": False,
        **{f"per_layer.{field.name}": None for field in fields(PerLayerSection)},
    }
    return {
        layer: config.replace({**shared, "name": f"{config.name}-{layer_name(layer)}", **own})
        for layer, own in layer_values(config).items()
    }


def layer_folders(path: str | Path) -> dict[int, Path]:
    """{layer: its run folder} of a layer set's folder, in order; empty for any other folder."""
    folder = Path(path) / LAYERS_FOLDER
    found = [p for p in folder.glob("*") if re.fullmatch(r"\d{2,}", p.name) and (p / "config.yaml").is_file()]
    return {int(p.name): p for p in sorted(found, key=lambda p: int(p.name))}


def layer_name(layer: int) -> str:
    """The name of a layer's folder: two digits or more."""
    return f"{layer:02}"


def _numbers(part: Any, value: Any) -> list[int]:
    if isinstance(part, int) and not isinstance(part, bool) and 0 <= part < MOST:
        return [part]
    if isinstance(part, str) and re.fullmatch(r"\s*\d+\s*(-\s*\d+\s*)?(,\s*\d+\s*(-\s*\d+\s*)?)*", part):
        ends = [[int(end) for end in span.split("-")] for span in part.split(",")]
        if all(span[0] <= span[-1] < MOST for span in ends):
            return [number for span in ends for number in range(span[0], span[-1] + 1)]
    raise refusal(LAYERS, EXPECTED, value)


def _layer_of_pair(pair: Sequence[str]) -> int:
    place = re.search(r"\.(\d+)\.", pair[0])
    if place is None:
        raise ConfigError(
            f"{LAYERS}: expected source hooks with a layer number, such as blocks.8.hook_resid_mid, got {pair[0]!r}"
        )
    return int(place[1])


def _at_layer(field: str, hook: str, layer: int) -> str:
    named = hook.replace(PLACE, str(layer)) if PLACE in hook else re.sub(r"(?<=\.)\d+(?=\.)", str(layer), hook, count=1)
    if named == hook and not re.search(r"\.\d+\.", hook):
        raise ConfigError(
            f"activations.{field}: expected a name with a layer number or {PLACE} for it, such as "
            f"blocks.{PLACE}.hook_resid_mid, since activations.layers is set; got {hook!r}"
        )
    return named


@dataclass(frozen=True)
class PerLayerSection(Section, where="per_layer."):
    """Settings in which the layers of a set differ. Each is a list with a value for each layer, a mapping of layers to values
    ({0-5: 32, 6-25: 64}), or two numbers with dots between (32..64: from the first layer to the last on a straight line)."""

    lr: Any = None
    """training.lr of each layer."""
    k: Any = None
    """transcoder.k of each layer."""
    d_sae: Any = None
    """transcoder.d_sae of each layer; transcoder.widths keep their proportions."""

    @property
    def given(self) -> dict[str, Any]:
        """What is set, by the dotted name of the setting."""
        found = {"training.lr": self.lr, "transcoder.k": self.k, "transcoder.d_sae": self.d_sae}
        return {name: value for name, value in found.items() if value is not None}

    def values(self, layers: Sequence[int]) -> dict[int, dict[str, Any]]:
        """{layer: {dotted name: value}} of the layers in order.

        Raises:
            ConfigError: a list of another length, a layer without a value, or something else than numbers.
        """
        found: dict[int, dict[str, Any]] = {layer: {} for layer in layers}
        for name, rule in self.given.items():
            kind: type = float if name == "training.lr" else int
            for layer, value in zip(
                layers, _by_rule(f"per_layer.{name.rpartition('.')[2]}", rule, layers, kind), strict=True
            ):
                found[layer][name] = value
        return found


def _by_rule(name: str, rule: Any, layers: Sequence[int], kind: type) -> list[Any]:
    if isinstance(rule, str) and (ends := re.fullmatch(r"\s*([^.\s]\S*?)\s*\.\.\s*(\S+)\s*", rule)):
        first, last = (float(convert(float, end, name)) for end in ends.groups())
        shares = [n / max(1, len(layers) - 1) for n in range(len(layers))]
        line = [first + share * (last - first) for share in shares]
        return [round(value) for value in line] if kind is int else line
    if isinstance(rule, Mapping):
        spans = [(set(_span(name, key)), convert(kind, value, f"{name}[{key}]")) for key, value in rule.items()]
        picked = [next((value for span, value in reversed(spans) if layer in span), None) for layer in layers]
        without = [layer for layer, value in zip(layers, picked, strict=True) if value is None]
        if without:
            raise ConfigError(f"{name}: expected a value for every layer of {LAYERS}, none for {without}")
        return picked
    if isinstance(rule, Sequence) and not isinstance(rule, str):
        if len(rule) != len(layers):
            raise ConfigError(f"{name}: expected {len(layers)} values, one for each layer of {LAYERS}, got {len(rule)}")
        return [convert(kind, value, f"{name}[{n}]") for n, value in enumerate(rule)]
    return [convert(kind, rule, name)] * len(layers)


def _span(name: str, key: Any) -> list[int]:
    try:
        return _numbers(key, key)
    except ConfigError:
        raise refusal(f"{name}", "layers such as 8 or 0-5 before each value", key) from None
