"""The packaged language model: its tokenizer, its loss, its boot in TransformerBridge, and its recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Gemma2ForCausalLM, PreTrainedTokenizerFast

import transcoder.demo
from tools.train_language_model import (
    Recipe,
    batches,
    bytes_per_token,
    heldout_loss,
    learning_rate_factor,
    main,
    next_token_loss,
    residual_norms,
    token_stream,
    train,
    unigram_loss,
    windows,
)
from transcoder.demo import language_model_path
from transcoder.demo.stdlib_text import iter_documents

SEQ_LEN = 128


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(language_model_path())


@pytest.fixture(scope="module")
def model() -> Gemma2ForCausalLM:
    found = Gemma2ForCausalLM.from_pretrained(language_model_path(), dtype=torch.float32, attn_implementation="eager")
    return found.eval()


@pytest.fixture(scope="module")
def heldout_rows(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """64 held-out sequences of shape [64, SEQ_LEN], spread over the split, without the look-up tables."""
    texts = [document.text for document in iter_documents("heldout") if not document.name.startswith("encodings/")]
    rows = windows(token_stream(tokenizer, texts), SEQ_LEN)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return rows[order[:64]]


def test_folder_is_complete_and_small() -> None:
    folder = language_model_path()
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    } <= names
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8_000_000
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "gemma2"
    assert config["dtype"] == "bfloat16"
    assert config["final_logit_softcapping"] == 30.0
    assert config["attn_logit_softcapping"] == 50.0


def test_missing_folder_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcoder.demo, "_MODEL_FOLDER", tmp_path / "language_model")
    with pytest.raises(FileNotFoundError, match=r"python tools/train_language_model\.py --out"):
        language_model_path()


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n\t  \r\n",
        "  def f(x):\n        return x  # trailing  \n",
        "naïve café – “quotes” … ½",
        "日本語 العربية हिन्दी 🧪👩‍👩‍👧",
        "\x00\x01\x7f\u200b\ufeff\U0010ffff",
        "e\u0301 stays decomposed, \u00e9 composed",
        "a < b, x<bo s> , ' , . ! ?  n't 're",
        "0123456789 1e-5 0x1F",
    ],
)
def test_tokenizer_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_special_tokens_are_those_of_gemma(tokenizer: PreTrainedTokenizerFast, model: Gemma2ForCausalLM) -> None:
    names = (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token)
    assert names == ("<pad>", "<eos>", "<bos>", "<unk>")
    assert tokenizer.convert_tokens_to_ids(list(names)) == [0, 1, 2, 3]
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert len(tokenizer) == model.config.vocab_size
    assert (model.config.pad_token_id, model.config.eos_token_id, model.config.bos_token_id) == (0, 1, 2)


def test_heldout_loss_is_far_below_the_unigram_baseline(
    tokenizer: PreTrainedTokenizerFast, model: Gemma2ForCausalLM, heldout_rows: torch.Tensor
) -> None:
    # A sixth of the train split is enough for its token frequencies.
    texts = [document.text for document in islice(iter_documents("train"), 100)]
    baseline = unigram_loss(token_stream(tokenizer, texts), heldout_rows, len(tokenizer))
    loss = heldout_loss(model, heldout_rows)
    assert 5.0 < baseline < 8.32  # the upper bound is that of a uniform guess over 4096 tokens
    assert loss < baseline - 2.0, f"{loss:.3f} nats/token against a unigram baseline of {baseline:.3f}"


def test_model_uses_its_context(model: Gemma2ForCausalLM, heldout_rows: torch.Tensor) -> None:
    # The same targets with a shuffled context must be much harder; a unigram model would not mind.
    shuffled = heldout_rows.clone()
    order = torch.randperm(SEQ_LEN - 2, generator=torch.Generator().manual_seed(1)) + 1
    shuffled[:, 1:-1] = heldout_rows[:, order]

    def last_token_loss(rows: torch.Tensor) -> float:
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(model(rows).logits[:, -2], rows[:, -1]))

    assert last_token_loss(heldout_rows) < last_token_loss(shuffled) - 1.0


def test_bfloat16_and_float32_runs_agree(model: Gemma2ForCausalLM, heldout_rows: torch.Tensor) -> None:
    lower = Gemma2ForCausalLM.from_pretrained(language_model_path(), dtype=torch.bfloat16, attn_implementation="eager")
    assert heldout_loss(lower, heldout_rows[:16]) == pytest.approx(heldout_loss(model, heldout_rows[:16]), abs=0.05)


def test_bytes_per_token_counts_the_bytes(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "héllo wörld 日本 🧪 " * 20
    row = torch.tensor([tokenizer(text).input_ids])
    assert bytes_per_token(tokenizer, row) * (row.shape[1] - 1) == pytest.approx(len(text.encode()))


def test_boots_in_transformer_bridge(model: Gemma2ForCausalLM, heldout_rows: torch.Tensor) -> None:
    bridge_module = pytest.importorskip("transformer_lens.model_bridge")
    bridge = bridge_module.TransformerBridge.boot_transformers(
        str(language_model_path()), device="cpu", dtype=torch.float32
    )
    tokens = heldout_rows[:4]
    with torch.no_grad():
        torch.testing.assert_close(bridge(tokens), model(tokens).logits, atol=1e-4, rtol=1e-4)
        plain = model(tokens, output_hidden_states=True).hidden_states
    for layer in range(model.config.num_hidden_layers):
        names = [f"blocks.{layer}.{hook}" for hook in ("hook_resid_mid", "hook_mlp_out", "mlp.hook_in", "mlp.hook_out")]
        with torch.no_grad():
            _, cache = bridge.run_with_cache(tokens, names_filter=names, stop_at_layer=layer + 1)
        for name in names:
            assert cache[name].shape == (4, SEQ_LEN, model.config.hidden_size)
            assert cache[name].isfinite().all()
        if layer + 1 < model.config.num_hidden_layers:  # the last hidden state is past the final norm
            block_output = cache[names[0]] + cache[names[1]]
            torch.testing.assert_close(block_output, plain[layer + 1], atol=1e-4, rtol=1e-4)


def test_windows_begin_with_bos_and_keep_the_stream() -> None:
    stream = torch.arange(10, 33)
    rows = windows(stream, seq_len=6, offset=2)
    assert rows.shape == (4, 6)
    assert (rows[:, 0] == 2).all()
    assert torch.equal(rows[:, 1:].flatten(), stream[2:22])


def test_batches_can_be_taken_up_anywhere() -> None:
    recipe = Recipe(seq_len=8, batch_size=3, seed=5)
    stream = torch.arange(200)

    def first(source: Iterator[torch.Tensor], count: int) -> list[torch.Tensor]:
        return [next(source) for _ in range(count)]

    whole = first(batches(stream, recipe), 25)  # 9 batches an epoch: three epochs
    assert all(batch.shape == (3, 8) for batch in whole)
    assert not torch.equal(whole[0], whole[9])
    for start in (4, 9, 17):
        rest = first(batches(stream, recipe, start=start), 5)
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[start : start + 5], strict=True))


def test_learning_rate_warms_up_and_decays() -> None:
    factors = [learning_rate_factor(step, step / 100, warmup_steps=10) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] or max(factors) == factors[10]
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0.02 <= factors[-1] < 0.03


TINY = Recipe(
    vocab_size=384,
    hidden_size=16,
    layers=2,
    heads=2,
    key_value_heads=1,
    head_dim=8,
    mlp_size=32,
    seq_len=32,
    batch_size=4,
    steps=3,
    max_documents=6,
)


def test_recipe_leaves_a_loadable_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tiny"
    threads = torch.get_num_threads()
    try:
        main(
            f"--out {out} --steps 3 --vocab-size 384 --hidden-size 16 --layers 2 --heads 2 --head-dim 8 "
            "--key-value-heads 1 --mlp-size 32 --seq-len 32 --batch-size 4 --max-documents 6 "
            "--no-progress".split()
        )
    finally:
        torch.set_num_threads(threads)  # the recipe trains on one thread by default
    figures = json.loads(capsys.readouterr().out)
    assert figures["steps"] == 3
    loaded = Gemma2ForCausalLM.from_pretrained(out, attn_implementation="eager")
    assert loaded.dtype == torch.bfloat16
    tiny_tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tiny_tokenizer("import os", return_tensors="pt").input_ids
    assert loaded(ids).logits.shape == (1, ids.shape[1], 384)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"{figures['heldout']['nats_per_token']:.3f}" in card
    assert not list(tmp_path.glob("*.checkpoint*"))


def test_interrupted_run_ends_like_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(TINY, tmp_path / "whole", progress_bar=False)

    calls = 0

    def fails_at_the_third_step(*arguments: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return next_token_loss(*arguments)  # type: ignore[arg-type]

    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda function: fails_at_the_third_step)
        with pytest.raises(KeyboardInterrupt):
            train(TINY, out, compiled=True, checkpoint_minutes=-1.0, progress_bar=False)
    assert (tmp_path / "cut.checkpoint.pt").is_file()
    resumed = train(TINY, out, progress_bar=False)
    assert resumed["heldout"] == whole["heldout"]
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    torch.save({"recipe": asdict(Recipe(seed=1))}, tmp_path / "model.checkpoint.pt")
    with pytest.raises(ValueError, match="another recipe"):
        train(TINY, tmp_path / "model", progress_bar=False)


def test_time_limit_ends_the_schedule(tmp_path: Path) -> None:
    figures = train(replace(TINY, steps=10**6), tmp_path / "model", max_minutes=1e-3, progress_bar=False)
    assert 0 < figures["steps"] < 10**6


def test_residual_norms_cover_every_layer(model: Gemma2ForCausalLM, heldout_rows: torch.Tensor) -> None:
    norms = residual_norms(model, heldout_rows[:8])
    assert len(norms) == model.config.num_hidden_layers
    for layer in norms:
        assert 0 < layer["median"] <= layer["maximum"]
        assert 0 <= layer["attention_to_bos"] <= 1
