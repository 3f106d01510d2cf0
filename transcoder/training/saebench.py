"""SAEBench's core metrics by its definitions (Karvonen et al. 2025, arXiv:2503.09532; sae-bench 0.6.0), for transcoders: its
activation and reconstruction are here the target and the transcoder's output."""

from __future__ import annotations

from collections import defaultdict
from functools import partial

import torch
from torch import Tensor

from transcoder.activations import ActivationStream
from transcoder.activations.rows import Substitute
from transcoder.model import Transcoder
from transcoder.training.evaluation import at_inference

PROMPTS = 16
"""Sequences of a batch, as there: its mean is the one in `explained_variance_legacy`."""


@torch.no_grad()
def saebench_core(transcoder: Transcoder, model: ActivationStream, tokens: int) -> dict[str, float]:
    """The metrics as {"saebench/<name>": value} on about `tokens` held-out tokens; {} without a language model to run, or with
    one that does not predict the next token.

    Special tokens (BOS, EOS, PAD and the tokenizer's others) keep their activations and are not counted, as with its option
    exclude_special_tokens_from_reconstruction. Tokens of a large norm are counted, which `evaluation/*` leaves out as sinks.

    Means over tokens, with y [T, d_out] the target, y_hat the output, m the mean of y over a batch:
        ce_loss_with_sae, ce_loss_without_sae, ce_loss_with_ablation: cross-entropy in nats of the next token, with the output,
            the target itself, zeros in the layer's place.   ce_loss_score: (ablation - sae) / (ablation - without).
        kl_div_with_sae, kl_div_with_ablation: KL(model || changed model) in nats.   kl_div_score: (ablation - sae) / ablation.
        explained_variance: 1 - mean |y - y_hat|^2 / (s - (s / d_out)^2) with s = mean |y|^2. So it stands there, where the
            squared mean of y is meant; `evaluation/explained_variance` has that.
        explained_variance_legacy: 1 - |y - y_hat|^2 / |y - m|^2 of each token.   cossim: of y and y_hat.
        l2_norm_in |y|, l2_norm_out |y_hat|, l2_ratio |y_hat| / |y|.
        relative_reconstruction_bias: mean |y_hat|^2 / mean of y times y_hat.
        l0, l1: number and sum of active latents, in the units of the latents.
    frac_alive: share of the latents that are active on one of these tokens.
    """
    per_token: dict[str, list[Tensor]] = defaultdict(list)
    per_batch: dict[str, list[Tensor]] = defaultdict(list)
    fired = torch.zeros(transcoder.config.d_sae, dtype=torch.bool, device=transcoder.W_dec.device)

    def stand_in(counted: Tensor, source: Tensor, target: Tensor) -> Tensor:
        output = transcoder(source).to(target.dtype)
        codes = transcoder.encode(source[counted])
        live = codes.values > 0
        fired.index_fill_(0, codes.indices[live], True)
        rows = torch.zeros(len(codes.row_ptr) - 1, dtype=torch.float64, device=live.device)
        per_token["l0"].append(rows.index_add(0, codes.rows(), live.double()))
        per_token["l1"].append(rows.index_add(0, codes.rows(), codes.values.double()))
        y, y_hat = target[counted].double(), output[counted].double()
        norm_in, norm_out, dot = y.norm(dim=1), y_hat.norm(dim=1), (y * y_hat).sum(1)
        per_token["l2_norm_in"].append(norm_in)
        per_token["l2_norm_out"].append(norm_out)
        per_token["l2_ratio"].append(norm_out / torch.where(norm_in < 1e-4, 1.0, norm_in))
        per_token["cossim"].append(dot / (norm_in * norm_out))
        error = (y - y_hat).square().sum(1)
        per_token["explained_variance_legacy"].append(1 - error / (y - y.mean(0)).square().sum(1))
        per_batch["error"].append(error.mean())
        per_batch["size"].append(norm_in.square().mean())
        per_batch["bias"].append(norm_out.square().mean() / dot.mean())
        return torch.where(counted[:, None], output, target)

    with at_inference(transcoder):
        for text, counted, run in model.heldout_groups(tokens, PROMPTS):
            if not bool(counted.any()):
                continue
            flat, predicted = counted.flatten(), counted[:, :-1]
            without = run(None).float().log_softmax(-1)
            changed: dict[str, Substitute] = {
                "with_sae": partial(stand_in, flat),
                "with_ablation": lambda _, target: torch.zeros_like(target),
            }
            per_token["ce_loss_without_sae"].append(_losses(without, text)[predicted])
            for name, substitute in changed.items():
                found = run(substitute).float().log_softmax(-1)
                per_token[f"ce_loss_{name}"].append(_losses(found, text)[predicted])
                per_token[f"kl_div_{name}"].append((without.exp() * (without - found)).sum(-1)[counted])
    if not per_token:
        return {}
    metrics = {name: _mean(torch.cat(values)) for name, values in per_token.items()}
    bias, size, error = (_mean(torch.stack(per_batch[name])) for name in ("bias", "size", "error"))
    metrics["relative_reconstruction_bias"] = bias
    metrics["explained_variance"] = 1 - error / (size - (size / transcoder.config.d_out) ** 2)
    metrics["frac_alive"] = float(fired.double().mean())
    ablated, ours, original = (metrics[f"ce_loss_{n}"] for n in ("with_ablation", "with_sae", "without_sae"))
    kl_ablated = metrics["kl_div_with_ablation"]
    if ablated != original:
        metrics["ce_loss_score"] = (ablated - ours) / (ablated - original)
    if kl_ablated != 0:
        metrics["kl_div_score"] = (kl_ablated - metrics["kl_div_with_sae"]) / kl_ablated
    return {f"saebench/{name}": value for name, value in sorted(metrics.items())}


def _losses(log_probabilities: Tensor, text: Tensor) -> Tensor:
    """[S, L - 1] of log-probabilities [S, L, V] and tokens [S, L]."""
    return -log_probabilities[:, :-1].gather(2, text[:, 1:, None]).squeeze(2)


def _mean(values: Tensor) -> float:
    """Over the finite ones: a token that is 0 has no direction."""
    values = values.double()
    return float(values[values.isfinite()].mean())
