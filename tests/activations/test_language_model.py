from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from transcoder.activations.language_model import HookedModel, ModelError, resolve_model_name

CPU = torch.device("cpu")
PAIRS = [
    ("blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"),
    ("blocks.1.mlp.hook_in", "blocks.1.mlp.hook_out"),
    ("blocks.2.ln2.hook_normalized", "blocks.2.hook_mlp_out"),
    ("blocks.0.hook_resid_pre", "blocks.2.hook_resid_post"),
    ("blocks.1.mlp.hook_in", "blocks.1.mlp.hook_post"),
    ("hook_embed", "blocks.0.attn.hook_z"),
]


def load(folder: Path, source: str, target: str, dtype: torch.dtype = torch.float32) -> HookedModel:
    return HookedModel(str(folder), source, target, dtype, CPU)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(4, 270, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_activations_are_those_of_run_with_cache(
    model_folder: Path, tokens: torch.Tensor, source: str, target: str
) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(model_folder), device="cpu", dtype=torch.float32)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens)
    model = load(model_folder, source, target)
    x, y = model.forward(tokens)
    assert torch.equal(x, cache[source].flatten(2))
    assert torch.equal(y, cache[target].flatten(2))
    assert (model.d_in, model.d_out) == (x.shape[-1], y.shape[-1])
    assert not x.requires_grad


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_nothing_runs_behind_the_target(model_folder: Path, tokens: torch.Tensor, layer: int) -> None:
    model = load(model_folder, f"blocks.{layer}.hook_resid_mid", f"blocks.{layer}.mlp.hook_out")
    ran: list[str] = []
    inner = model._bridge.original_model
    for name, module in inner.named_modules():
        if name.endswith(("post_feedforward_layernorm.original_component", "lm_head")):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    for number, block in enumerate(model._bridge.blocks):
        block.hook_in.add_hook(lambda activation, hook, number=number: ran.append(f"block {number}"))
    model.forward(tokens)
    assert [r for r in ran if r.startswith("block")] == [f"block {i}" for i in range(layer + 1)]
    assert not any("lm_head" in r for r in ran)
    # The norm behind the MLP belongs to the target's own block, and to earlier ones only.
    assert not any(f"layers.{layer}." in r for r in ran)


def test_two_threads_do_not_mix_their_activations(hooked: HookedModel) -> None:
    import threading

    inputs = [torch.randint(4, 270, (2, 9), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    expected = [hooked.forward(x) for x in inputs]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(15):
            x, y = hooked.forward(inputs[number])
            if not (torch.equal(x, expected[number][0]) and torch.equal(y, expected[number][1])):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_dtype_is_the_models(model_folder: Path, tokens: torch.Tensor) -> None:
    x, y = load(model_folder, *PAIRS[0], dtype=torch.bfloat16).forward(tokens)
    assert x.dtype == y.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("blocks.1.hook_resid_midd", "blocks.1.hook_mlp_out", "nearest are 'blocks.1.hook_resid_mid'"),
        ("blocks.1.hook_resid_mid", "blocks.1.mlp.hook_outt", r"target_hook.*'blocks.1.mlp.hook_out'"),
        ("blocks.1.hook_resid_mid", "blocks.9.hook_mlp_out", r"blocks 0 to 2"),
        ("blocks.2.hook_resid_mid", "blocks.1.hook_mlp_out", "later layer"),
        ("blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out", "cannot be read"),
        ("blocks.1.hook_resid_mid", "blocks.1.attn.hook_pattern", "expected .sequences, positions, width"),
    ],
)
def test_wrong_hooks(model_folder: Path, source: str, target: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(model_folder, source, target)


def test_model_names(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model_name(str(model_folder)) == str(model_folder)
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_model_name(str(tmp_path))
    for missing in ("./nothing", "/no/such/model", "~/no/such", "a/b/c"):
        with pytest.raises(ModelError, match="no model folder"):
            resolve_model_name(missing)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match="Check the name"):
        resolve_model_name("nobody/no-such-model")
    with pytest.raises(ModelError, match="no hub name either"):
        resolve_model_name("two words")


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"adapter_config.json": '{"base_model_name_or_path": "org/base"}'}, r"adapter \(LoRA\) of org/base"),
        ({"transcoder.safetensors": "x", "config.json": '{"format": "transcoder"}'}, "holds a transcoder"),
        ({"sae_weights.safetensors": "x", "cfg.json": "{}"}, "sparse autoencoder of SAELens"),
        ({"checkpoints/step_00000004/state.json": "{}", "config.yaml": "name: x"}, "folder of a run"),
        ({"model_index.json": "{}", "unet/config.json": "{}"}, "pipeline of diffusers"),
        ({"consolidated.00.pth": "x", "params.json": "{}"}, "Meta's own layout"),
        ({"model.gguf": "GGUF"}, "llama.cpp"),
        ({"snapshots/abc/config.json": "{}"}, "there is one in .*abc"),
        ({"config.json": "{"}, "without model_type"),
        ({"config.json": '{"model_type": "llama"}', "tokenizer.json": "{}"}, "no weights"),
        (
            {
                "config.json": '{"model_type": "llama"}',
                "model.safetensors.index.json": '{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}',
                "model-1.safetensors": "x",
            },
            "lacks model-2.safetensors",
        ),
    ],
)
def test_a_folder_that_is_no_model_is_told_apart(files: dict[str, str], what: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=rf"model\.name: the folder .*{what}"):
        resolve_model_name(str(tmp_path))


def test_a_file_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"is a file; give the folder .*llama\.cpp"):
        resolve_model_name(str(file))


def test_a_torn_model_is_named(model_folder: Path, tmp_path: Path) -> None:
    for file in model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ModelError, match="cannot load"):
        load(tmp_path, *PAIRS[0])


def test_losses_are_the_models_and_follow_what_stands_in(model_folder: Path, tokens: torch.Tensor) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(model_folder), device="cpu", dtype=torch.float32)
    logits = bridge.forward(tokens, return_type="logits")
    want = -logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    model = load(model_folder, "blocks.1.mlp.hook_in", "blocks.1.mlp.hook_out")
    torch.testing.assert_close(model.next_token_losses(tokens), want)
    x, y = model.forward(tokens)
    seen = []

    def same(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.append((source, target))
        return target

    assert torch.equal(model.next_token_losses(tokens, same), model.next_token_losses(tokens))
    assert torch.equal(seen[0][0], x.flatten(0, 1))
    assert torch.equal(seen[0][1], y.flatten(0, 1))
    other = model.next_token_losses(tokens, lambda source, target: torch.randn_like(target))
    assert not torch.allclose(other, want, atol=1e-4)
    assert torch.equal(model.forward(tokens)[1], y)  # and nothing of it stays


def test_a_source_behind_its_target_in_the_layer_is_refused(model_folder: Path) -> None:
    with pytest.raises(ModelError, match="comes after target_hook"):
        load(model_folder, "blocks.1.hook_mlp_out", "blocks.1.hook_resid_mid")


def test_a_pickle_in_a_models_folder_is_not_run(model_folder: Path, tmp_path: Path) -> None:
    """The weights of a foreign model as a pickle that makes a file when it is loaded."""
    folder, proof = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").unlink()

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(proof),))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.embed_tokens.weight": Hostile()}))
    with pytest.raises(ModelError, match=r"model\.name"):
        HookedModel(str(folder), "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out", torch.float32, torch.device("cpu"))
    assert not proof.exists()


@pytest.mark.parametrize(
    ("path", "hooks"),
    [
        ("model.layers.1.mlp", "blocks.1.mlp"),
        ("layers.1.mlp", "blocks.1.mlp"),
        ("model.layers[2].self_attn", "blocks.2.attn"),
        ("model.layers.0", "blocks.0"),
        ("model.layers.1.mlp.down_proj", "blocks.1.mlp.out"),
    ],
)
def test_a_module_path_is_answered_with_its_hooks(model_folder: Path, path: str, hooks: str) -> None:
    with pytest.raises(ModelError) as refusal:
        load(model_folder, path, "blocks.2.hook_resid_post")
    assert f"activations.source_hook: {path!r} is a module of this model" in str(refusal.value)
    assert f"input is the hook '{hooks}.hook_in', its output '{hooks}.hook_out'" in str(refusal.value)


@pytest.mark.parametrize("path", ["transformer.h.1.mlp", "gpt_neox.layers.1.mlp", "h.1.mlp"])
def test_a_module_path_of_another_architecture_leads_to_the_block(model_folder: Path, path: str) -> None:
    with pytest.raises(ModelError, match=r"no hook .*nearest are 'blocks\.1\.mlp\.hook_in'"):
        load(model_folder, "blocks.0.hook_resid_pre", path)
