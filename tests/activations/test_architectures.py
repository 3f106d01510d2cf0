"""Hooks and direct effects on many architectures, against the modules of Hugging Face's own models."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from transcoder.activations.language_model import HookedModel, ModelError

LAYERS, WIDTH, VOCABULARY = 2, 16, 300
_COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS}
_COMMON |= {"num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2}
_LLAMA: dict[str, Any] = {**_COMMON, "intermediate_size": 32, "num_key_value_heads": 1, "pad_token_id": 0}
_GEMMA: dict[str, Any] = {**_LLAMA, "head_dim": 8, "sliding_window": 32, "query_pre_attn_scalar": 8}
_GPT: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": 64}
_GPT["initializer_range"] = 0.2

ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2", "transformer.h.{}.mlp", _GPT),
    "gptj": ("GPTJ", "transformer.h.{}.mlp", {**_GPT, "rotary_dim": 4}),
    "neox-parallel": ("GPTNeoX", "gpt_neox.layers.{}.mlp", {**_COMMON, "intermediate_size": 32}),
    "neox-sequential": (
        "GPTNeoX",
        "gpt_neox.layers.{}.mlp",
        {**_COMMON, "intermediate_size": 32, "use_parallel_residual": False},
    ),
    "llama": ("Llama", "model.layers.{}.mlp", _LLAMA),
    "llama-tied": ("Llama", "model.layers.{}.mlp", {**_LLAMA, "tie_word_embeddings": True}),
    "mistral": ("Mistral", "model.layers.{}.mlp", _LLAMA),
    "qwen2": ("Qwen2", "model.layers.{}.mlp", _LLAMA),
    "qwen3": ("Qwen3", "model.layers.{}.mlp", {**_LLAMA, "head_dim": 8}),
    "olmo2": ("Olmo2", "model.layers.{}.mlp", _LLAMA),
    "phi": ("Phi", "model.layers.{}.mlp", {**_LLAMA, "num_key_value_heads": 2}),
    "gemma2": ("Gemma2", "model.layers.{}.mlp", {**_GEMMA, "final_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3Text", "model.layers.{}.mlp", _GEMMA),
}


def make_model(name: str, folder: Path) -> Any:
    """A random model of `ARCHITECTURES[name]`, saved in `folder`; its norms are away from their start."""
    import transformers

    family, _, settings = ARCHITECTURES[name]
    config = getattr(transformers, f"{family}Config")(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(folder)
    return model


def mlp_of(model: Any, name: str, layer: int) -> torch.nn.Module:
    return model.get_submodule(ARCHITECTURES[name][1].format(layer))


CPU, LAST = torch.device("cpu"), LAYERS - 1


@functools.lru_cache(maxsize=32)
def hooked_model(folder: Path, source: str, target: str, dtype: torch.dtype = torch.float32) -> HookedModel:
    names = (f"blocks.{LAST}.{source}", f"blocks.{LAST}.{target}")
    return HookedModel(str(folder), *names, dtype, CPU, progress=False)


class Made(NamedTuple):
    name: str
    folder: Path
    model: Any

    def hooked(self, source: str, target: str, dtype: torch.dtype = torch.float32) -> HookedModel:
        return hooked_model(self.folder, source, target, dtype)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Made:
    folder = tmp_path_factory.mktemp(request.param)
    for file in model_folder.glob("*token*"):
        shutil.copy(file, folder)
    return Made(request.param, folder, make_model(request.param, folder))


def text() -> Tensor:
    return torch.randint(5, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(0))


def test_the_hooks_have_what_the_module_reads_and_writes(made: Made) -> None:
    seen: dict[str, Tensor] = {}

    def note(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.update(source=inputs[0].view(2, 11, WIDTH), target=output.view(2, 11, WIDTH))

    with mlp_of(made.model, made.name, LAST).register_forward_hook(note), torch.no_grad():
        made.model(text())
    source, target = made.hooked("mlp.hook_in", "mlp.hook_out").forward(text())
    torch.testing.assert_close(source, seen["source"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(target, seen["target"], rtol=1e-5, atol=1e-5)


def test_attention_is_the_models_own_where_no_hook_is_inside_it(made: Made) -> None:
    model = made.hooked("mlp.hook_in", "mlp.hook_out")
    assert model._bridge.original_model.config._attn_implementation == made.model.config._attn_implementation
    long = torch.arange(96).view(2, 48) % VOCABULARY  # beyond the sliding windows
    with torch.no_grad():
        expected = made.model(long, output_hidden_states=True, use_cache=False)
    torch.testing.assert_close(model.logits(long, {}), expected.logits, rtol=1e-4, atol=1e-4)
    inside = {"gpt2": "attn.hook_q", "llama": "attn.hook_rot_q"}.get(made.name)
    if inside is not None:
        # It fires only where the bridge computes attention step by step.
        assert made.hooked(inside, "hook_attn_out")._bridge.original_model.config._attn_implementation == "eager"


def test_the_residual_stream_gets_hook_mlp_out_and_hook_attn_out(made: Made) -> None:
    if made.name in ("gptj", "neox-parallel", "phi"):
        # Attention and MLP read the same stream: there is none between them.
        with pytest.raises(ModelError, match="hook_resid_mid"):
            made.hooked("hook_resid_mid", "hook_mlp_out")
        return
    before, out = made.hooked("hook_resid_mid", "hook_mlp_out").forward(text())
    _, after = made.hooked("hook_resid_mid", "hook_resid_post").forward(text())
    torch.testing.assert_close(after - before, out, rtol=1e-4, atol=1e-5)
    start, attention = made.hooked("hook_resid_pre", "hook_attn_out").forward(text())
    torch.testing.assert_close(before - start, attention, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["mlp.hook_out", "hook_mlp_out"])
def test_the_direct_effect_is_the_finite_difference_of_the_models_logits(made: Made, target: str) -> None:
    """A step in a module's output changes the logits by the direct effect and by what it does to the scales of the norms that
    it meets, which is a multiple of the effect of the module's output and of that of the residual stream."""
    hooked = made.hooked("hook_resid_pre", target)
    unembedding = hooked.unembedding()
    of_stream = made.hooked("hook_resid_pre", "hook_resid_post").unembedding()
    assert isinstance(unembedding, Tensor)
    assert isinstance(of_stream, Tensor)
    assert unembedding.shape == (WIDTH, VOCABULARY)
    model = make_model(made.name, made.folder).double()
    step = torch.randn(6, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens = torch.full((1, 1), 7)
    module = mlp_of(model, made.name, LAST)
    norm = (
        getattr(model.get_submodule(f"model.layers.{LAST}"), "post_feedforward_layernorm", None)
        if hasattr(model, "model")
        else None
    )
    place = norm if norm is not None and target == "hook_mlp_out" else module
    held: dict[str, Tensor] = {}

    def logits(change: Tensor) -> Tensor:
        def replace(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
            held["out"] = output.detach().reshape(-1)
            return output + change.view_as(output)

        with place.register_forward_hook(replace), torch.no_grad():
            return model(tokens).logits[0, -1]

    plain = logits(torch.zeros(WIDTH, dtype=torch.float64))
    eps = 3e-3 * held["out"].std()  # the models' norms are fp32 whatever the model is
    change = torch.stack([logits(eps * row) - logits(-eps * row) for row in step]) / (2 * eps)
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is not None:
        change = change / (1 - (plain / cap).square())
    _, stream = made.hooked("hook_resid_pre", "hook_resid_post").forward(tokens)
    direct = step @ unembedding.double()
    scales = torch.stack([held["out"] @ unembedding.double(), stream[0, 0].double() @ of_stream.double()])
    for wanted, got in zip(change, direct, strict=True):
        basis = torch.stack([got, *scales], dim=1)
        found = torch.linalg.lstsq(basis, wanted[:, None]).solution
        rest = wanted - (basis @ found)[:, 0]
        assert rest.norm() < 1e-3 * wanted.norm(), f"{made.name} {target}"
        assert found[0] > 0


@pytest.mark.parametrize("made", ["gpt2", "llama", "gemma2", "olmo2"], indirect=True)
def test_half_precision_gives_the_same_effect(made: Made) -> None:
    full = made.hooked("hook_resid_pre", "mlp.hook_out").unembedding()
    if made.name == "olmo2":
        # TransformerLens' own attention mixes types there.
        with pytest.raises(ModelError, match=r"model\.dtype: .* does not run in torch\.bfloat16"):
            made.hooked("hook_resid_pre", "mlp.hook_out", torch.bfloat16)
        return
    half = made.hooked("hook_resid_pre", "mlp.hook_out", torch.bfloat16).unembedding()
    assert isinstance(full, Tensor)
    assert isinstance(half, Tensor)
    assert torch.cosine_similarity(full, half, dim=1).min() > 0.999


def test_a_model_predicts_the_next_token(made: Made) -> None:
    assert made.hooked("hook_resid_pre", "mlp.hook_out").without_head is None


_BERT = {**_COMMON, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("family", "kind", "settings", "why"),
    [
        ("Llama", "LlamaModel", _LLAMA, "is a LlamaModel, which has no head"),
        ("Llama", "LlamaForSequenceClassification", _LLAMA, "has no head for the next token"),
        ("Bert", "BertForMaskedLM", _BERT, "from those behind it as well"),
        ("Bert", "BertModel", _BERT, "from those behind it as well"),
        ("GPT2", "GPT2Model", _GPT, None),
    ],
)
def test_a_model_without_a_head_for_the_next_token_is_told(
    family: str, kind: str, settings: dict[str, Any], why: str | None, tmp_path: Path, model_folder: Path
) -> None:
    import transformers

    torch.manual_seed(0)
    getattr(transformers, kind)(getattr(transformers, f"{family}Config")(**settings)).save_pretrained(tmp_path)
    for file in model_folder.glob("*token*"):
        shutil.copy(file, tmp_path)
    model = HookedModel(str(tmp_path), "blocks.1.mlp.hook_in", "blocks.1.mlp.hook_out", torch.float32, CPU, False)
    if why is None:
        # The embedding is its head.
        assert model.without_head is None
        return
    assert why in str(model.without_head)
    assert model.unembedding() == model.without_head


@pytest.mark.parametrize("made", ["gpt2", "neox-parallel", "gemma2"], indirect=True)
def test_a_refused_pair_names_pairs_that_work(made: Made) -> None:
    for source, target in (("mlp.hook_out", "mlp.hook_in"), ("hook_resid_pre", "attn.hook_pattern")):
        with pytest.raises(ModelError, match=r"Pairs that this model has: ") as refusal:
            made.hooked(source, target)
        pairs = str(refusal.value).split("Pairs that this model has: ")[1].split(", ")
        assert pairs[0] == "blocks.1.mlp.hook_in -> blocks.1.mlp.hook_out"
        for pair in pairs[:2]:
            made.hooked(*(hook.removeprefix("blocks.1.") for hook in pair.split(" -> ")))
