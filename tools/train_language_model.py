"""Recipe of the packaged language model: a small Gemma-2 trained on the standard library's source files.

    python tools/train_language_model.py --out DIR

trains the byte-level BPE tokenizer and the model on the ``train`` split of `transcoder.demo.stdlib_text`,
measures the loss on the ``heldout`` split and leaves a Hugging Face folder with a model card in DIR. A run
that was interrupted goes on from its last checkpoint when the same command is given again.

With ``--max-minutes`` left at 0 the result depends only on the flags, the seed, the Python version (the text)
and the library versions. A time limit instead shortens the schedule to the machine's pace.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from transcoder.demo.stdlib_text import count_skipped, iter_documents

# The order gives the ids of Gemma: <pad> 0, <eos> 1, <bos> 2, <unk> 3.
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")
PAD_ID, EOS_ID, BOS_ID, UNK_ID = range(4)

# Look-up tables that resemble one another across the two splits: held-out loss is given without them too.
TABLE_PREFIX = "encodings/"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, apart from the text and the library versions."""

    vocab_size: int = 4096
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    head_dim: int = 32
    mlp_size: int = 512
    seq_len: int = 128
    batch_size: int = 16
    steps: int = 8000
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    seed: int = 0
    max_documents: int | None = None


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with Gemma's special tokens.

    All 256 bytes are in the vocabulary, so every string is encoded without <unk> and decodes to itself.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> torch.Tensor:
    """Encode documents one after another, each closed by <eos>.

    Returns:
        int64 token ids, shape [tokens]; no <bos> in it (`windows` puts it in).
    """
    ids: list[int] = []
    for text in texts:
        # One document at a time: a batch would start as many threads as there are cores.
        ids.extend(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
        ids.append(EOS_ID)
    return torch.tensor(ids, dtype=torch.int64)


def windows(stream: torch.Tensor, seq_len: int, offset: int = 0) -> torch.Tensor:
    """Cut a stream of tokens into sequences that begin with <bos>; what does not fill a sequence is dropped.

    Args:
        stream: token ids, shape [tokens].
        seq_len: tokens per sequence, <bos> included.
        offset: tokens left out at the beginning of the stream.

    Returns:
        int64 token ids, shape [(tokens - offset) // (seq_len - 1), seq_len].
    """
    body = seq_len - 1
    count = max(0, len(stream) - offset) // body
    rows = stream[offset : offset + count * body].view(count, body)
    return torch.cat([torch.full((count, 1), BOS_ID, dtype=torch.int64), rows], dim=1)


def batches(stream: torch.Tensor, recipe: Recipe, start: int = 0) -> Iterator[torch.Tensor]:
    """Yield batches of shape [batch_size, seq_len] without end, from batch number ``start`` on.

    Each epoch cuts the stream at another offset and shuffles the sequences; both come from the seed and the
    epoch's number alone, which is what makes an interrupted run repeatable.
    """
    # One count for all epochs, whatever their offset, so that a batch number decides its epoch.
    per_epoch = (len(stream) - (recipe.seq_len - 2)) // (recipe.seq_len - 1) // recipe.batch_size
    if per_epoch < 1:
        raise ValueError(f"{len(stream)} tokens do not fill a batch of {recipe.batch_size} x {recipe.seq_len}")
    number = start
    while True:
        epoch, first = divmod(number, per_epoch)
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
        offset = int(torch.randint(recipe.seq_len - 1, (), generator=generator))
        rows = windows(stream, recipe.seq_len, offset)
        order = torch.randperm(len(rows), generator=generator)
        for index in range(first, per_epoch):
            yield rows[order[index * recipe.batch_size : (index + 1) * recipe.batch_size]]
            number += 1


def build_model(recipe: Recipe) -> Gemma2ForCausalLM:
    """Return a freshly initialised Gemma-2 in float32, with the released models' soft caps and norms."""
    torch.manual_seed(recipe.seed)
    config = Gemma2Config(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.mlp_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        head_dim=recipe.head_dim,
        query_pre_attn_scalar=recipe.head_dim,
        # Not below the training length: the alternating window is in the architecture but never cuts here.
        sliding_window=max(128, recipe.seq_len),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        bos_token_id=BOS_ID,
        attn_implementation="eager",  # the only one that applies the attention softcap
    )
    return Gemma2ForCausalLM(config)


def next_token_loss(model: Gemma2ForCausalLM, tokens: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Return the cross-entropy of predicting tokens[:, 1:], in nats; tokens has shape [batch, seq_len]."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    targets = tokens[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction=reduction)


@torch.no_grad()
def heldout_loss(model: Gemma2ForCausalLM, rows: torch.Tensor, batch_size: int = 32) -> float:
    """Return the mean loss in nats per predicted token over sequences of shape [count, seq_len]."""
    was_training = model.training
    model.eval()
    total = sum(float(next_token_loss(model, part, reduction="sum")) for part in rows.split(batch_size))
    model.train(was_training)
    return total / rows[:, 1:].numel()


def unigram_loss(train_stream: torch.Tensor, rows: torch.Tensor, vocab_size: int) -> float:
    """Return the nats per predicted token of the train split's token frequencies (add-one smoothed).

    Args:
        train_stream: token ids, shape [tokens].
        rows: held-out sequences, shape [count, seq_len]; the first token of each is not predicted.
    """
    counts = torch.bincount(train_stream, minlength=vocab_size).double() + 1
    return float(-(counts / counts.sum()).log()[rows[:, 1:]].mean())


def bytes_per_token(tokenizer: PreTrainedTokenizerFast, rows: torch.Tensor) -> float:
    """Return the mean number of UTF-8 bytes behind a predicted token of [count, seq_len] sequences."""
    # In a byte-level vocabulary each character of a token stands for one byte; special tokens stand for none.
    length = torch.zeros(len(tokenizer), dtype=torch.float64)
    for token, index in tokenizer.get_vocab().items():
        length[index] = 0 if token in SPECIAL_TOKENS else len(token)
    return float(length[rows[:, 1:]].mean())


@torch.no_grad()
def residual_norms(model: Gemma2ForCausalLM, rows: torch.Tensor) -> list[dict[str, float]]:
    """Measure per layer whether <bos> has a massive residual norm and draws the attention (a sink).

    Args:
        rows: sequences of shape [count, seq_len] that begin with <bos>.

    Returns:
        per layer (residual stream after the block, before the final norm): the mean L2 norm at position 0,
        the median and the maximum of the norm over the other positions, and the mean share of the attention
        of the sequence's second half that goes to position 0, where uniform attention would give about 1.4 /
        seq_len.
    """
    found: dict[int, torch.Tensor] = {}
    handles = [
        layer.register_forward_hook(
            lambda module, inputs, output, index=index: found.__setitem__(
                index, output[0] if isinstance(output, tuple) else output
            )
        )
        for index, layer in enumerate(model.model.layers)
    ]
    model.eval()
    try:
        attentions = model(input_ids=rows, use_cache=False, output_attentions=True).attentions
    finally:
        for handle in handles:
            handle.remove()
    result = []
    for index in sorted(found):
        norms = found[index].float().norm(dim=-1)
        result.append(
            {
                "bos": float(norms[:, 0].mean()),
                "median": float(norms[:, 1:].median()),
                "maximum": float(norms[:, 1:].max()),
                "attention_to_bos": float(attentions[index][:, :, rows.shape[1] // 2 :, 0].float().mean()),
            }
        )
    return result


def learning_rate_factor(step: int, progress: float, warmup_steps: int) -> float:
    """Linear warm-up times a cosine from 1 to 0.02; ``progress`` is the done part of the run, 0 to 1."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return min(1.0, (step + 1) / max(1, warmup_steps)) * cosine


def train(
    recipe: Recipe,
    out: Path,
    *,
    max_minutes: float = 0.0,
    checkpoint_minutes: float = 4.0,
    checkpoint: Path | None = None,
    compiled: bool = False,
    progress_bar: bool = True,
) -> dict[str, Any]:
    """Train tokenizer and model and write the model folder, early versions of it included.

    Args:
        recipe: sizes, schedule and seed.
        out: model folder to write.
        max_minutes: shorten the schedule so that training ends after this wall time; 0 for no limit.
        checkpoint_minutes: wall time between two checkpoints, each with a usable model in ``out``.
        checkpoint: file to resume from and to write to; by default next to ``out``, removed at the end.
        compiled: let `torch.compile` fuse the loss (needs a C++ compiler; about 1.5 times as fast on a CPU).

    Returns:
        what was measured, as it stands in the model card.
    """
    checkpoint = checkpoint or out.with_name(out.name + ".checkpoint.pt")
    state: dict[str, Any] | None = None
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        if state["recipe"] != asdict(recipe):
            raise ValueError(f"{checkpoint} is of another recipe: {state['recipe']}; remove it to start again")

    train_texts = [document.text for document in islice(iter_documents("train"), recipe.max_documents)]
    heldout_documents = list(islice(iter_documents("heldout"), recipe.max_documents))
    if state is None:
        tokenizer = train_tokenizer(train_texts, recipe.vocab_size)
        _save_tokenizer(tokenizer, out)
    # Loaded even when just trained, so that the model sees exactly what a user of the folder will get.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    stream = token_stream(tokenizer, train_texts)
    heldout_texts = [document.text for document in heldout_documents]
    heldout = windows(token_stream(tokenizer, heldout_texts), recipe.seq_len)
    code_texts = [document.text for document in heldout_documents if not document.name.startswith(TABLE_PREFIX)]
    heldout_code = windows(token_stream(tokenizer, code_texts), recipe.seq_len)
    # A strided sample of the held-out sequences for the checkpoints' running figure.
    sample = heldout[:: max(1, len(heldout) // 128)]

    model = build_model(recipe)
    model.train()
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    training_loss = torch.compile(next_token_loss) if compiled else next_token_loss
    step, seconds, curve = 0, 0.0, []
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds, curve = state["step"], state["seconds"], state["curve"]

    def save(progress: float) -> None:
        curve.append([step, round(heldout_loss(model, sample), 4)])
        _save_model(model, out)
        partial = checkpoint.with_suffix(".partial")
        torch.save(
            {
                "recipe": asdict(recipe),
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "seconds": seconds,
                "curve": curve,
            },
            partial,
        )
        os.replace(partial, checkpoint)
        message = f"step {step}, {progress:.0%}, held-out sample {curve[-1][1]:.4f} nats/token"
        tqdm.write(message, file=sys.stderr)  # stdout is for the figures alone

    bar = tqdm(total=recipe.steps, initial=step, disable=not progress_bar, unit="step", mininterval=5)
    last_save = seconds
    for tokens in batches(stream, recipe, start=step):
        progress = step / recipe.steps
        if max_minutes > 0:
            progress = max(progress, seconds / (60 * max_minutes))
        if progress >= 1:
            break
        if seconds - last_save > 60 * checkpoint_minutes:
            save(progress)
            last_save = seconds
        begin = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * learning_rate_factor(step, progress, recipe.warmup_steps)
        loss = training_loss(model, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        seconds += time.perf_counter() - begin
        bar.update()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{float(loss):.3f}", refresh=False)
    bar.close()
    save(1.0)

    # Measured on what is shipped: the bfloat16 weights of the folder, run in float32 as a CPU user would.
    shipped = Gemma2ForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
    figures: dict[str, Any] = {
        "recipe": asdict(recipe),
        "parameters": sum(parameter.numel() for parameter in shipped.parameters()),
        "steps": step,
        "seconds": round(seconds, 1),
        "tokens_seen": step * recipe.batch_size * recipe.seq_len,
        "tokens_per_second": round(step * recipe.batch_size * recipe.seq_len / max(seconds, 1e-9), 1),
        "max_minutes": max_minutes,
        "compiled": compiled,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "train_documents": len(train_texts),
        "train_tokens": len(stream),
        "heldout_documents": len(heldout_documents),
        "skipped_documents": count_skipped(),
        "heldout": _loss_figures(shipped, tokenizer, stream, heldout),
        "heldout_without_tables": _loss_figures(shipped, tokenizer, stream, heldout_code),
        "train_sample": round(heldout_loss(shipped, windows(stream, recipe.seq_len)[::200]), 4),
        "residual_norms": residual_norms(shipped, sample[:64]),
        "curve": curve,
    }
    (out / "README.md").write_text(model_card(figures), encoding="utf-8")
    checkpoint.unlink()
    return figures


def _loss_figures(
    model: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerFast, stream: torch.Tensor, rows: torch.Tensor
) -> dict[str, float]:
    width = bytes_per_token(tokenizer, rows)
    nats = heldout_loss(model, rows)
    unigram = unigram_loss(stream, rows, len(tokenizer))
    return {
        "tokens": rows[:, 1:].numel(),
        "bytes_per_token": round(width, 4),
        "nats_per_token": round(nats, 4),
        "bits_per_byte": round(nats / math.log(2) / width, 4),
        "unigram_nats_per_token": round(unigram, 4),
        "unigram_bits_per_byte": round(unigram / math.log(2) / width, 4),
    }


def _save_model(model: Gemma2ForCausalLM, out: Path) -> None:
    """Write config and bfloat16 weights; the model itself stays in float32."""
    shipped = copy.deepcopy(model).to(torch.bfloat16)
    shipped.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # safetensors writes it readable by its owner alone


def _save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    # transformers 5 writes a class name of its own, which transformers 4 does not know; both know this one.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.pop("backend", None)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def sink_sentence(norms: Sequence[dict[str, float]], seq_len: int) -> str:
    """Say in words whether the figures of `residual_norms` show a massive <bos> and an attention sink."""
    ratio = max(layer["bos"] / layer["median"] for layer in norms)
    largest = max(layer["maximum"] / layer["median"] for layer in norms)
    share = max(layer["attention_to_bos"] for layer in norms)
    massive = "is a massive-norm token" if ratio > 5 else "is no massive-norm token"
    sink = "an attention sink" if share > 0.2 else "no strong attention sink"
    return (
        f"`<bos>` {massive}: its residual norm is at most {ratio:.2f} times the median of the other "
        f"positions (the largest norm anywhere else is {largest:.2f} times the median). It is {sink}: at "
        f"most {share:.1%} of a layer's attention from the second half of the sequence goes to it, where "
        f"uniform attention would give about {1.4 / seq_len:.1%}."
    )


def model_card(figures: dict[str, Any]) -> str:
    """Return the README of the model folder for what `train` measured."""
    recipe, norms = figures["recipe"], figures["residual_norms"]

    def losses(label: str, found: dict[str, float]) -> str:
        return (
            f"| {label} | {found['tokens']:,} | {found['nats_per_token']:.3f} | {found['bits_per_byte']:.3f} "
            f"| {found['unigram_nats_per_token']:.3f} | {found['unigram_bits_per_byte']:.3f} |"
        )

    norm_rows = [
        f"| {index} | {layer['bos']:.2f} | {layer['median']:.2f} | {layer['maximum']:.2f} "
        f"| {layer['attention_to_bos']:.1%} |"
        for index, layer in enumerate(norms)
    ]
    curve = ", ".join(f"{step}: {loss:.3f}" for step, loss in figures["curve"])
    epochs = figures["tokens_seen"] / figures["train_tokens"]
    shortened = figures["steps"] < recipe["steps"]
    planned = (
        f" (of {recipe['steps']:,} planned: `--max-minutes {figures['max_minutes']:g}` shortened the schedule, "
        "so another run will not give the same weights)"
        if shortened
        else ""
    )
    threads = f"{figures['threads']} CPU thread{'s' if figures['threads'] != 1 else ''}"
    compiled = " with `--compile`" if figures["compiled"] else ""
    table_head = (
        "| held-out text | tokens | nats/token | bits/byte | unigram nats/token | unigram bits/byte |\n"
        "|---|---|---|---|---|---|"
    )
    norm_head = (
        "| after layer | norm at `<bos>` | median elsewhere | maximum elsewhere | attention to `<bos>` |\n"
        "|---|---|---|---|---|"
    )
    blocks = [
        "---\nlicense: mit\nlanguage: code\ntags: [gemma2, python]\n---",
        "# Packaged language model",
        _fill(
            f"""A Gemma-2 of {figures["parameters"]:,} parameters, trained from scratch on the source files
            of the Python standard library. It is here so that transcoders can be trained, tested and looked
            at without any download; it continues Python source in the manner of the standard library and is
            of no use beyond that. `transcoder.demo.language_model_path()` returns this folder."""
        ),
        "## Architecture",
        _fill(
            f"""`Gemma2ForCausalLM` with hidden size {recipe["hidden_size"]}, {recipe["layers"]} layers,
            {recipe["heads"]} heads ({recipe["key_value_heads"]} key-value heads) of width
            {recipe["head_dim"]}, MLP width {recipe["mlp_size"]}, vocabulary {recipe["vocab_size"]}, tied
            embeddings, Gemma-2's four norms per layer and both soft caps (50 on attention, 30 on logits).
            The attention of every second layer has a sliding window no shorter than the training length of
            {recipe["seq_len"]} tokens, so the window was never felt in training; positions beyond it were
            never trained either. Weights are stored in bfloat16. Use eager attention: other kernels may
            leave out the attention soft cap."""
        ),
        "## Tokenizer",
        _fill(
            f"""Byte-level BPE of {recipe["vocab_size"]} tokens, trained on the same train split. Special
            tokens as in Gemma: `<pad>` 0, `<eos>` 1, `<bos>` 2, `<unk>` 3 (never produced: all 256 bytes are
            in the vocabulary). `<bos>` is put in front by default; any string decodes to itself with
            `skip_special_tokens=True`, as long as it does not contain the name of a special token. One token
            is {figures["heldout"]["bytes_per_token"]:.2f} bytes of held-out text on average."""
        ),
        "## Training data",
        _fill(
            f"""The train split of `transcoder.demo.stdlib_text` on Python {figures["python"]}:
            {figures["train_documents"]} files, {figures["train_tokens"]:,} tokens, without tests and site
            packages ({figures["skipped_documents"]} files were skipped because they are not UTF-8). Each
            file ends in `<eos>`; files are packed one after another and cut into sequences of `<bos>` and
            {recipe["seq_len"] - 1} tokens, so most sequences begin inside a file."""
        ),
        "## Training",
        _fill(
            f"""`python tools/train_language_model.py --out DIR`: AdamW (0.9, 0.95), weight decay
            {recipe["weight_decay"]} on matrices, peak learning rate {recipe["learning_rate"]},
            {recipe["warmup_steps"]} warm-up steps and a cosine down to 2 %, gradient norm clipped at 1,
            batches of {recipe["batch_size"]} x {recipe["seq_len"]} tokens, float32, seed {recipe["seed"]}.
            {figures["steps"]:,} steps{planned}, {figures["tokens_seen"]:,} tokens ({epochs:.2f} epochs),
            {figures["seconds"]:,.0f} s on {threads}{compiled} ({figures["tokens_per_second"]:,.0f} tokens/s
            on a shared machine), torch {figures["torch"]}."""
        ),
        "## Held-out loss",
        _fill(
            f"""On the {figures["heldout_documents"]} files of the heldout split (about 5 % of the file
            names), in sequences of `<bos>` and {recipe["seq_len"] - 1} tokens, with the stored weights run
            in float32. The unigram baseline is the train split's token frequencies."""
        ),
        "\n".join(
            [
                table_head,
                losses("all files", figures["heldout"]),
                losses("without `encodings/`", figures["heldout_without_tables"]),
            ]
        ),
        _fill(
            f"""The second row leaves out the look-up tables of `encodings/`, which resemble one another so
            much that they flatter the first. For comparison, the loss on a sample of the train split is
            {figures["train_sample"]:.3f} nats/token. On a fixed sample of held-out sequences at each
            checkpoint (step: nats/token): {curve}."""
        ),
        "## Residual norms and attention sink",
        _fill(sink_sentence(norms, recipe["seq_len"])),
        "\n".join([norm_head, *norm_rows]),
        "## Licence",
        _fill(
            """The weights were trained from scratch on the source code of the CPython standard library (PSF
            licence) and are released under MIT."""
        ),
    ]
    return "\n\n".join(blocks) + "\n"


def _fill(paragraph: str) -> str:
    # Neither hyphens nor long words may be broken: both occur in code spans.
    return textwrap.fill(" ".join(paragraph.split()), width=110, break_long_words=False, break_on_hyphens=False)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    defaults = Recipe()
    parser = argparse.ArgumentParser(
        prog="python tools/train_language_model.py",
        description="Train the packaged language model on the standard library's source files.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size, help="sequences per step")
    parser.add_argument("--seq-len", type=int, default=defaults.seq_len, help="tokens per sequence, <bos> included")
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate, help="peak learning rate")
    parser.add_argument("--warmup-steps", type=int, default=defaults.warmup_steps, help="linear warm-up")
    parser.add_argument("--weight-decay", type=float, default=defaults.weight_decay, help="on matrices only")
    parser.add_argument("--vocab-size", type=int, default=defaults.vocab_size, help="tokens of the tokenizer")
    parser.add_argument("--hidden-size", type=int, default=defaults.hidden_size, help="residual stream width")
    parser.add_argument("--mlp-size", type=int, default=defaults.mlp_size, help="MLP width")
    parser.add_argument("--layers", type=int, default=defaults.layers, help="number of blocks")
    parser.add_argument("--heads", type=int, default=defaults.heads, help="query heads")
    parser.add_argument("--key-value-heads", type=int, default=defaults.key_value_heads, help="key-value heads")
    parser.add_argument("--head-dim", type=int, default=defaults.head_dim, help="width of a head")
    parser.add_argument("--max-documents", type=int, default=None, help="use only so many files of each split")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="initialisation and order of the data")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the training")
    parser.add_argument(
        "--max-minutes", type=float, default=0.0, help="shorten the schedule to this wall time; 0: no limit"
    )
    parser.add_argument("--checkpoint-minutes", type=float, default=4.0, help="wall time between checkpoints")
    parser.add_argument("--compile", action="store_true", help="torch.compile the loss (needs a C++ compiler)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe from the command line."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    recipe = Recipe(**{name: getattr(options, name) for name in Recipe.__dataclass_fields__})
    figures = train(
        recipe,
        options.out,
        max_minutes=options.max_minutes,
        checkpoint_minutes=options.checkpoint_minutes,
        compiled=options.compile,
        progress_bar=not options.no_progress,
    )
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
