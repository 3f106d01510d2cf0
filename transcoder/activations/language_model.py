"""The language model: hooked at two places, stopped as soon as both have fired."""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import itertools
import logging
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from transcoder.activations.direct_effect import unembedding_at
from transcoder.activations.model_attention import use_own_attention
from transcoder.activations.model_name import ModelError, check_library, resolve_model_name
from transcoder.activations.rows import Substitute
from transcoder.activations.vocabulary import Vocabulary, no_tokenizer, own_tokenizer
from transcoder.settings import brief

logger = logging.getLogger(__name__)

LOGITS = 1 << 27
"""Logits of a pass: 1.3 GB with the temporaries of the softmax."""


def layer_of(hook: str) -> int | None:
    """The block that a hook name belongs to; None outside the blocks."""
    match = re.match(r"blocks\.(\d+)\.", hook)
    return int(match.group(1)) if match else None


_PAIRS = (
    ("mlp.hook_in", "mlp.hook_out"),
    ("ln2.hook_normalized", "hook_mlp_out"),
    ("hook_resid_mid", "hook_mlp_out"),
    ("hook_resid_pre", "hook_attn_out"),
)


class HookedModel:
    """A TransformerBridge that yields the activations at pairs of hooks, all of them from one pass.

    Args:
        name: as `resolve_model_name` takes it.
        source_hook, target_hook: TransformerLens names, canonical or alias, such as
            `blocks.8.hook_resid_mid` and `blocks.8.hook_mlp_out`, or `blocks.8.mlp.hook_in` and
            `blocks.8.mlp.hook_out`; for several layers, a sequence of each, as long as the other.
        dtype: type of weights and activations.
        device: where it runs.
        progress: False keeps the loader's progress bars quiet.

    Attributes:
        pairs: (source hook, target hook) of each layer.
        widths: (d_in, d_out) of each pair (a hook with heads is flattened); d_in, d_out: of the first.
        vocabulary: the tokenizer and the model's vocabulary size.
        token_bytes: bytes of a token's activations at both hooks of each pair.

    Raises:
        ModelError: an unknown hook (with the nearest names), one that never fires, or a source after its
            target's layer.
    """

    def __init__(
        self,
        name: str,
        source_hook: str | Sequence[str],
        target_hook: str | Sequence[str],
        dtype: torch.dtype,
        device: torch.device,
        progress: bool = True,
    ) -> None:
        sources, targets = ([hook] if isinstance(hook, str) else list(hook) for hook in (source_hook, target_hook))
        self.pairs = list(zip(sources, targets, strict=True))
        for pair in self.pairs:
            _check_layers(*pair)
        folder = resolve_model_name(name)
        check_library()
        from transformer_lens.model_bridge import TransformerBridge

        own = own_tokenizer(folder)
        given = {} if own is not None else {"tokenizer": no_tokenizer()}
        try:
            with _no_progress_bars(but_downloads=progress):
                bridge = TransformerBridge.boot_transformers(folder, device=str(device), dtype=dtype, **given)
        except Exception as error:
            # Loading raises many types: a torn weight file, an architecture without an adapter, no network
            # half-way.
            raise ModelError(f"model.name: cannot load {name!r}: {type(error).__name__}: {brief(error)}") from error
        bridge.eval()
        bridge.requires_grad_(False)
        self._bridge: Any = bridge
        self._device = device
        # Training and evaluation may run the model from two threads, and the captures are this object's.
        self._lock = threading.Lock()
        self._captured: dict[str, Tensor] = {}
        """By hook, in the order in which the pass came to them."""
        self._substitutes: Mapping[int, Substitute] = {}
        """By the number of the pair."""
        self._whole = False
        """Whether the pass runs to its end."""
        self._hooks = dict.fromkeys(sources, "source") | dict.fromkeys(targets, "target")
        self._pair_of_target = {hook: n for n, hook in enumerate(targets)}
        self.max_length: int | None = getattr(bridge.cfg, "n_ctx", None)
        size = int(bridge.cfg.d_vocab)
        # The bridge gives a tokenizer without BOS its EOS as one.
        stands_in = own is not None and own.bos_token_id is None
        self.vocabulary = Vocabulary(None if own is None else bridge.tokenizer, size, bos_stands_in=stands_in)
        self.vocabulary.check()
        self._attach()
        try:
            with self._lock:
                self._capture_all(tokens := torch.arange(26, device=device).view(2, 13) % size)
                order = list(self._captured)
                found = self._take_pairs(tokens)
            self._speed_up(found, tokens)
        except RuntimeError as error:
            # Some of the bridge's attentions mix types in half precision.
            if dtype == torch.float32 or isinstance(error, torch.OutOfMemoryError):
                raise
            raise ModelError(f"model.dtype: {name!r} does not run in {dtype}: {brief(error)}; try float32") from error
        for source, target in self.pairs:
            if order.index(source) > order.index(target):
                raise ModelError(
                    f"activations.source_hook: {source!r} comes after target_hook {target!r} in the layer; a transcoder "
                    f"predicts an output from what comes before it{self._working_pairs(target)}"
                )
        self.widths = [(source.shape[-1], target.shape[-1]) for source, target in found]
        self.token_bytes = [sum(t.shape[-1] * t.element_size() for t in pair) for pair in found]
        self.d_in, self.d_out = self.widths[0]

    def _speed_up(self, expected: list[tuple[Tensor, Tensor]], tokens: Tensor) -> None:
        """Use the model's own attention, unless a hook then no longer fires or the activations of these tokens are not those
        `expected`, up to rounding."""
        take_back = use_own_attention(self._bridge)
        if take_back is None:
            return
        try:
            found = self.forward_pairs(tokens)
            same = all(map(_agree, itertools.chain(*found), itertools.chain(*expected)))
        except Exception as error:
            # Of the hook's own making, or of an architecture that calls its attention in another way.
            logger.info("attention as TransformerLens computes it: %s", brief(error))
            same = False
        if not same:
            take_back()

    def fingerprint(self) -> str:
        """16 hexadecimal digits that depend on the weights' shapes and on up to 64 values spread over each: the
        same wherever the model lies and whatever it is called. Reads the device."""
        digests = []
        for weight in self._bridge.parameters():
            flat = weight.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // 64)][:64].float().cpu().numpy()
            digests.append(hashlib.blake2b(repr(tuple(weight.shape)).encode() + some.tobytes()).digest())
        # Sorted: the order and the names of the modules are the library's, and may change with its version.
        return hashlib.blake2b(b"".join(sorted(digests)), digest_size=8).hexdigest()

    def _attach(self) -> None:
        names = self._bridge.hook_dict
        for hook, role in self._hooks.items():
            if hook not in names:
                module = _hooks_of_module(self._bridge, hook)
                if module is not None:
                    raise ModelError(
                        f"activations.{role}_hook: {hook!r} is a module of this model: its input is the hook "
                        f"{module[0]!r}, its output {module[1]!r}"
                    )
                # A module path of another architecture still says the block and, often, the part of it.
                meant = re.sub(r"^(?!blocks\.)\D*\b(\d+)\b", r"blocks.\1", hook)
                close = difflib.get_close_matches(meant, names, n=3, cutoff=0.5)
                layers = int(self._bridge.cfg.n_layers)
                raise ModelError(
                    f"activations.{role}_hook: this model has no hook {hook!r}; the nearest are "
                    f"{', '.join(map(repr, close)) or 'none'} (blocks 0 to {layers - 1})"
                )
            try:
                self._bridge.add_hook(hook, self._capture(hook), is_permanent=True)
            except (ValueError, NotImplementedError) as error:
                raise ModelError(
                    f"activations.{role}_hook: {hook!r} cannot be read on this model: {brief(error)}{self._working_pairs(hook)}"
                ) from error

    def _capture(self, name: str) -> Any:
        from transformer_lens.model_bridge.exceptions import StopAtLayerException

        def capture(activation: Tensor, hook: object) -> Tensor | None:
            self._captured[name] = activation.detach()
            if self._whole:
                pair = self._pair_of_target.get(name)
                if pair is None or pair not in self._substitutes:
                    return None
                source = self._captured[self.pairs[pair][0]]
                found = self._substitutes[pair](source.flatten(0, 1).flatten(1), activation.flatten(0, 1).flatten(1))
                # The source of a later layer may be this very hook.
                self._captured[name] = found.to(activation.dtype).view_as(activation)
                return self._captured[name]
            if len(self._captured) == len(self._hooks):
                # The bridge's own signal for stop_at_layer, sent from inside the layer: nothing after the
                # last hook runs, neither the rest of its block nor, for the last block, the unembedding.
                raise StopAtLayerException(activation)
            return None

        return capture

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(source [S, L, d_in], target [S, L, d_out]) of the first pair, of tokens [S, L] int64, in the model's dtype.

        Equivalent to: `run_with_cache(tokens)` read at the two hooks.
        """
        return self.forward_pairs(tokens)[0]

    def forward_pairs(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """As `forward`, of every pair: one pass, to the last hook."""
        with self._lock:
            self._capture_all(tokens)
            return self._take_pairs(tokens)

    @torch.no_grad()
    def _capture_all(self, tokens: Tensor) -> None:
        self._captured.clear()
        self._bridge.forward(tokens, return_type=None, use_cache=False)

    def _take_pairs(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        try:
            for hook, role in self._hooks.items():
                if hook not in self._captured:
                    raise ModelError(
                        f"activations.{role}_hook: {hook!r} exists on this model but never fires{self._working_pairs(hook)}"
                    )
            return [(self._flat(source, tokens), self._flat(target, tokens)) for source, target in self.pairs]
        finally:
            self._captured.clear()

    def _working_pairs(self, hook: str) -> str:
        """For errors: the pairs of hooks that transcoders are usually trained on, as far as the hook's layer has them."""
        prefix = f"blocks.{layer_of(hook) or 0}."
        pairs = ((prefix + source, prefix + target) for source, target in _PAIRS)
        there = [f"{source} -> {target}" for source, target in pairs if {source, target} <= set(self._bridge.hook_dict)]
        return f". Pairs that this model has: {', '.join(there)}" if there else ""

    def sequences_at_a_time(self, length: int) -> int:
        """How many sequences `next_token_losses` should be given together."""
        return max(1, LOGITS // (length * self.vocabulary.size))

    @torch.no_grad()
    def next_token_losses(
        self, tokens: Tensor, substitute: Substitute | Mapping[int, Substitute] | None = None
    ) -> Tensor:
        """[S, L - 1] fp32: cross-entropy in nats of each token after the first, of tokens [S, L] int64.

        `substitute` takes the activations at the two hooks, [S L, d_in] and [S L, d_out], and gives what the rest of the model
        reads at the target hook instead, [S L, d_out]: of the first pair, or of each pair whose number it is given for. A later
        layer then reads what earlier ones made of it. All logits exist at once: see `sequences_at_a_time`.
        """
        substitutes = {} if substitute is None else substitute if isinstance(substitute, Mapping) else {0: substitute}
        logits = self.logits(tokens, substitutes)
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
        ).view(tokens.shape[0], -1)

    @torch.no_grad()
    def logits(self, tokens: Tensor, substitutes: Mapping[int, Substitute]) -> Tensor:
        """[S, L, vocabulary], `substitutes` by the number of their pair, as in `next_token_losses`."""
        with self._lock:
            self._captured.clear()
            self._substitutes, self._whole = substitutes, True
            try:
                logits: Tensor = self._bridge.forward(tokens, return_type="logits", use_cache=False)
                return logits
            finally:
                self._captured.clear()
                self._substitutes, self._whole = {}, False

    @functools.cached_property
    def without_head(self) -> str | None:
        """Why its logits are not those of the next token; None where they are."""
        config = self._bridge.original_model.config
        made_for = [str(name) for name in getattr(config, "architectures", None) or ()]
        # The library puts a random head on a model that has none of its own, unless the embedding is the head.
        heads = any(re.search(r"CausalLM|LMHead|ConditionalGeneration", name) for name in made_for)
        if made_for and not heads and not getattr(config, "tie_word_embeddings", False):
            return f"the model is a {', '.join(made_for)}, which has no head for the next token"
        tokens = torch.zeros(1, 8, dtype=torch.int64, device=self._device)
        changed = tokens.clone()
        changed[0, -1] = 1
        before, after = self.logits(tokens, {})[:, :-1].float(), self.logits(changed, {})[:, :-1].float()
        if not torch.allclose(before, after, rtol=0, atol=1e-4 * float(before.std())):
            return "the model predicts a token from those behind it as well"
        return None

    @torch.no_grad()
    def unembedding(self, pair: int = 0) -> Tensor | str:
        """[d_out, vocabulary] fp32: a small step at the target hook of this pair times it is the step's direct effect on the
        logits, through the model's own norms at a fixed scale; or the reason why the target hook has none."""
        return self.without_head or unembedding_at(
            self.pairs[pair][1], self.widths[pair][1], self._bridge, self._replace
        )

    def _replace(self, written: str, read: str, values: Tensor) -> Tensor:
        """[n, width]: what the hook `read` has when `written` has values [n, width'], one a position."""
        found: list[Tensor] = []
        tokens = torch.zeros(1, len(values), dtype=torch.int64, device=self._device)
        hooks = [
            (written, lambda old, hook: values.to(old.dtype).view_as(old)),
            (read, lambda value, hook: found.append(value.detach())),
        ]
        with self._lock:
            self._whole = True
            try:
                self._bridge.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits", use_cache=False)
            finally:
                self._captured.clear()
                self._whole = False
        return found[0].flatten(0, -2).float()

    def _flat(self, hook: str, tokens: Tensor) -> Tensor:
        value = self._captured[hook]
        if value.dim() < 3 or value.shape[:2] != tokens.shape or not value.is_floating_point():
            raise ModelError(
                f"activations.{self._hooks[hook]}_hook: {hook!r} gives shape {tuple(value.shape)} for tokens "
                f"{tuple(tokens.shape)}; expected [sequences, positions, width]{self._working_pairs(hook)}"
            )
        return value.flatten(2)


def _agree(found: Tensor, expected: Tensor) -> bool:
    error = float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30))
    return error < (1e-3 if expected.dtype == torch.float32 else 0.05)


def _hooks_of_module(bridge: Any, path: str) -> tuple[str, str] | None:
    """The hooks at the input and the output of a module, by its path in Hugging Face's model, such as `model.layers.1.mlp`, or
    the end of that path (`layers.1.mlp`); None unless exactly one module is meant."""
    path = re.sub(r"\[(\d+)\]", r".\1", path)
    # The bridge's wrappers stand in the paths of its modules, and each of its hook points knows its own name.
    found = {}
    for place, point in bridge.original_model.named_modules():
        if place.endswith(".hook_in"):
            module = place.replace("._original_component", "").removesuffix(".hook_in")
            if f".{module}".endswith(f".{path}"):
                found[module] = str(point.name)
    if len(found) != 1 and path not in found:
        return None
    into = found[path] if path in found else next(iter(found.values()))
    out = into.removesuffix("hook_in") + "hook_out"
    return (into, out) if {into, out} <= set(bridge.hook_dict) else None


@contextlib.contextmanager
def _no_progress_bars(but_downloads: bool) -> Iterator[None]:
    """None of transformers' own (a command has its own lines), nor, but for `but_downloads`, of the hub's client; as they were
    afterwards."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    ours, hubs = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.disable_progress_bar()  # the hub's too
    if but_downloads and hubs:
        enable_progress_bars()
    else:
        disable_progress_bars()
    try:
        yield
    finally:
        if ours:
            logging.enable_progress_bar()
        (enable_progress_bars if hubs else disable_progress_bars)()


def _check_layers(source_hook: str, target_hook: str) -> None:
    source, target = layer_of(source_hook), layer_of(target_hook)
    if source is not None and target is not None and source > target:
        raise ModelError(
            f"activations.source_hook: {source_hook!r} lies in a later layer than target_hook "
            f"{target_hook!r}; a transcoder predicts a layer's output from what comes before it"
        )
