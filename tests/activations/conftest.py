"""A random Gemma-2 of three layers with its tokenizer, and text in every form that a run can read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.activations.streams import files
from transcoder.activations import ActivationStream, build_stream
from transcoder.activations.documents import is_heldout
from transcoder.activations.language_model import HookedModel
from transcoder.activations.packing import Packer
from transcoder.config import RunConfig

CPU = torch.device("cpu")
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "brew",
    "ale",
]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: 3 layers, width 16, byte-level tokens, the special tokens of Gemma."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    )
    fast.save_pretrained(folder)
    config = Gemma2Config(
        vocab_size=len(fast),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=32,
        max_position_embeddings=128,
        sliding_window=64,
        query_pre_attn_scalar=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Gemma2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def hooked(model_folder: Path) -> HookedModel:
    return HookedModel(str(model_folder), "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out", torch.float32, CPU)


def sentence(number: int) -> str:
    """Document `number`: unlike every other, of 5 to 24 words."""
    words = [WORDS[(number * 7 + i * (1 + number % 5)) % len(WORDS)] for i in range(5 + number % 20)]
    return f"{number}: " + " ".join(words)


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return [sentence(i) for i in range(60)]


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    path = tmp_path_factory.mktemp("jsonl") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": d, "source": "test"}) + "\n" for d in documents))
    return path


@pytest.fixture
def make_config(model_folder: Path, jsonl: Path) -> Callable[..., RunConfig]:
    """A small run on the tiny model and the 60 documents; keywords are fields of `activations`."""

    def make(batch_size: int = 32, seed: int = 0, **activations: Any) -> RunConfig:
        section = {
            "source_hook": "blocks.1.hook_resid_mid",
            "target_hook": "blocks.1.hook_mlp_out",
            "dataset": str(jsonl),
            "sequence_length": 16,
            "sequences_per_forward": 4,
            "buffer_tokens": 256,
            "heldout_fraction": 0.2,
            "prefetch": 0,
            # `auto` reads 8,192 tokens of every stream before its first batch.
            "mask_norm_multiple": 10.0,
            **activations,
        }
        return RunConfig.from_dict(
            {
                "model": {"name": str(model_folder)},
                "activations": section,
                "training": {"batch_size": batch_size, "seed": seed, "evaluation_tokens": 64},
            }
        )

    return make


@pytest.fixture
def build(make_config: Callable[..., RunConfig], shared_models: None) -> Iterator[Callable[..., ActivationStream]]:
    """build(position_sampler=, context_tokens=, **activations): a stream that is closed when the test ends."""
    made: list[ActivationStream] = []

    def make(position_sampler: Any = None, context_tokens: int = 0, **activations: Any) -> ActivationStream:
        config = make_config(**activations)
        sampler = position_sampler and (lambda ids: position_sampler)
        made.append(build_stream(config, CPU, position_sampler=sampler, context_tokens=context_tokens))
        return made[-1]

    yield make
    for stream in made:
        stream.close()


@pytest.fixture
def packed(jsonl: Path, hooked: HookedModel) -> Callable[[int], Tensor]:
    """packed(n): the first n training sequences [n, 16] of the default test run, straight from the packer."""

    def pack(count: int) -> Tensor:
        packer = Packer(files(jsonl, "text", None), hooked.vocabulary, 16, True, lambda d: not is_heldout(d.index, 0.2))
        found = packer.pack(count)
        assert found is not None
        return torch.from_numpy(found.tokens)

    return pack
