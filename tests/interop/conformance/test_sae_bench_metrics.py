"""Our core metrics and SAEBench's own functions on the same weights, model and tokens; its loader on our export."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from transcoder.activations import build_stream
from transcoder.config import RunConfig
from transcoder.interop.formats import export_transcoder
from transcoder.model import Transcoder, TranscoderConfig
from transcoder.training.saebench import saebench_core

core = pytest.importorskip("sae_bench.evals.core.main", reason="python tests/interop/run.py sae-bench")
HOOK = "blocks.1.mlp.hook_out"
TOKENS = 512


class Model:
    """What SAEBench calls of a HookedTransformer, on the stream's language model."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def _both(self, substitute: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits, text = self.run(substitute), self.text
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), text[:, 1:], reduction="none")
        return logits, losses

    def __call__(self, text: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.text = text
        return self._both(None)

    def run_with_hooks(self, text: torch.Tensor, fwd_hooks: Any, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ((_, hook),) = fwd_hooks
        shape = (*text.shape, -1)
        return self._both(lambda _, target: hook(target.view(shape), hook=None).flatten(0, 1))

    def run_with_cache(self, text: torch.Tensor, **_: Any) -> tuple[None, dict[str, torch.Tensor]]:
        seen: list[torch.Tensor] = []

        def catch(_: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            seen.append(target)
            return target

        self.run(catch)
        return None, {HOOK: seen[0].view(*text.shape, -1)}


@torch.no_grad()
def test_the_core_metrics_are_those_of_sae_bench(tmp_path: Path) -> None:
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
    from sae_lens import SAE

    config = RunConfig().replace(
        {
            "activations.source_hook": HOOK,
            "activations.target_hook": HOOK,
            "activations.sequence_length": 32,
            "activations.sequences_per_forward": 16,
            "activations.mask_norm_multiple": None,
            "training.batch_size": 64,
            "logging.progress": False,
        }
    )
    model = Transcoder(TranscoderConfig(128, 128, 300, 7, activation="topk"), seed=3).eval()
    model.W_enc.copy_(model.W_dec)
    export_transcoder(
        model, "saelens", tmp_path / "out", architecture="topk", source_hook=HOOK, target_hook=HOOK, model_name="demo"
    )
    _, theirs, _ = load_and_format_sae("ours", SAE.load_from_disk(tmp_path / "out"), "cpu")
    assert (theirs.cfg.hook_name, theirs.cfg.hook_layer, theirs.cfg.model_name) == (HOOK, 1, "demo")
    with build_stream(config, torch.device("cpu")) as stream:
        found = saebench_core(model, stream, TOKENS)
        ((text, counted, run),) = list(stream.heldout_groups(TOKENS, 16))
        ignored = set(stream.special_ids)
    assert torch.equal(counted, ~torch.isin(text, torch.tensor(sorted(ignored))))
    store = SimpleNamespace(get_batch_tokens=lambda _: text, normalize_activations="none")
    shared = {"n_batches": 1, "eval_batch_size_prompts": 16, "ignore_tokens": ignored}
    quality, latents = core.get_sparsity_and_variance_metrics(
        theirs,
        Model(run),
        store,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
        model_kwargs={},
        **shared,
    )
    behaviour = core.get_downstream_reconstruction_metrics(
        theirs,
        Model(run),
        store,
        compute_kl=True,
        compute_ce_loss=True,
        exclude_special_tokens_from_reconstruction=True,
        **shared,
    )
    alive = (torch.tensor(latents["feature_density"]) > 0).double().mean()
    expected = {**quality, **behaviour, "frac_alive": float(alive)}
    # Theirs is divided by the number of tokens once more than its name says.
    expected.pop("mse")
    assert found.keys() == {f"saebench/{name}" for name in expected}
    for name, value in expected.items():
        assert found[f"saebench/{name}"] == pytest.approx(value, rel=2e-4, abs=1e-5), name
