"""The language model's own attention in the place of TransformerLens': the same values, at the speed of the bare model."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any


def use_own_attention(bridge: Any) -> Callable[[], None] | None:
    """Let the model's attention modules run as transformers would run them (scaled_dot_product_attention, for most), where the
    bridge computes each step apart so that hooks can fire on it: at 1,024 tokens a sequence that takes half of a pass, and on a
    GPU the memory of all scores.

    Hooks inside attention (scores, pattern, rotated queries and keys) no longer fire.

    Returns:
        What takes it back; None where transformers too would compute the steps apart (soft caps, for one), and nothing changed.
    """
    from transformer_lens.model_bridge.generalized_components import AttentionBridge

    model = bridge.original_model
    before = model.config._attn_implementation
    # Given nothing, transformers names what it would choose on loading this model.
    own = model.get_correct_attn_implementation(None)
    if own in ("eager", before) or not model._can_set_attn_implementation():
        return None
    stepwise = [
        module
        for module in bridge.modules()
        if isinstance(module, AttentionBridge) and type(module).forward is not AttentionBridge.forward
    ]

    def take_back() -> None:
        model.set_attn_implementation(before)
        for module in stepwise:
            object.__delattr__(module, "forward")

    model.set_attn_implementation(own)
    for module in stepwise:
        # The base class calls the model's module, with hooks around it.
        # (Its __setattr__ would write to the model's module instead.)
        object.__setattr__(module, "forward", types.MethodType(AttentionBridge.forward, module))
    return take_back
