"""Recipe of the packaged language model: a small Gemma-2 trained on the standard library's source files.

    python -m transcoder.demo.train_language_model --out DIR

trains the byte-level BPE tokenizer and the model on the ``train`` split of `transcoder.demo.stdlib_text`,
measures both splits' statistics on the ``heldout`` split and leaves a Hugging Face folder with a model card in
DIR. A run that was interrupted goes on from its last checkpoint when the same command is given again.

With ``--max-minutes`` left at 0 the result depends only on the flags, the seed, the Python version (the text)
and the library versions. A time limit instead shortens the schedule to the machine's pace.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from transcoder.demo.stdlib_text import count_skipped, iter_documents

# The order gives the ids of Gemma: <pad> 0, <eos> 1, <bos> 2, <unk> 3.
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")
PAD_ID, EOS_ID, BOS_ID, UNK_ID = range(4)

# Files of look-up tables, close to one another across the two splits; held-out loss is given without them too.
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
    steps: int = 4500
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
        # The backend is asked for one document at a time: a batch would start as many threads as there are cores.
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
        raise ValueError(f"{len(stream)} tokens do not fill one batch of {recipe.batch_size} x {recipe.seq_len}")
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
    """Return a freshly initialised Gemma-2 in float32; softcaps and norms are those of the released models."""
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
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction=reduction)


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
        per layer (the residual stream after the layer's block, before the final norm): the L2 norm at position
        0, the median and the maximum of the norm over the other positions, and the mean share of a query's
        attention that goes to position 0 from the second half of the sequence, where uniform attention would
        give about 1.5 / seq_len.
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
    """Linear warm-up times a cosine from 1 to 0.02; ``progress`` is the part of the run that is done, 0 to 1."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return min(1.0, (step + 1) / max(1, warmup_steps)) * cosine


def train(
    recipe: Recipe,
    out: Path,
    *,
    max_minutes: float = 0.0,
    checkpoint_minutes: float = 4.0,
    checkpoint: Path | None = None,
    progress_bar: bool = True,
) -> dict[str, Any]:
    """Train tokenizer and model and write the model folder, early versions of it included.

    Args:
        recipe: sizes, schedule and seed.
        out: model folder to write.
        max_minutes: shorten the schedule so that training ends after this wall time; 0 for no limit.
        checkpoint_minutes: wall time between two checkpoints, each with a usable model in ``out``.
        checkpoint: file to resume from and to write to; by default beside ``out``, removed at the end.

    Returns:
        what was measured, as it stands in the model card.
    """
    checkpoint = checkpoint or out.with_name(out.name + ".checkpoint.pt")
    state: dict[str, Any] | None = None
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        if state["recipe"] != asdict(recipe):
            raise ValueError(f"{checkpoint} is of another recipe ({state['recipe']}); remove it to start anew")

    train_documents = list(iter_documents("train"))[: recipe.max_documents]
    heldout_documents = list(iter_documents("heldout"))[: recipe.max_documents]
    if state is None:
        tokenizer = train_tokenizer((document.text for document in train_documents), recipe.vocab_size)
        tokenizer.model_max_length = 512
        tokenizer.save_pretrained(out)
    # Loaded even when just trained, so that the model sees exactly what a user of the folder will get.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    stream = token_stream(tokenizer, (document.text for document in train_documents))
    heldout = windows(token_stream(tokenizer, (document.text for document in heldout_documents)), recipe.seq_len)
    prose = [document.text for document in heldout_documents if not document.name.startswith(TABLE_PREFIX)]
    heldout_code = windows(token_stream(tokenizer, prose), recipe.seq_len)
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
        tqdm.write(f"step {step}, {progress:.0%}, held-out sample {curve[-1][1]:.4f} nats/token")

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
        loss = next_token_loss(model, tokens)
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
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "train_documents": len(train_documents),
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
    copy = Gemma2ForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(out)


