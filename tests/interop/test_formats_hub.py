"""push_to_hub and from_pretrained("org/name") over HTTP against a hub of one process; the model card's escapes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from transcoder import Transcoder, TranscoderConfig, push_to_hub
from transcoder.interop.export_source import Source, load_source
from transcoder.interop.folded_weights import Hooks
from transcoder.interop.hub import model_card

from .hub_server import HubServer

PUSH = """
import sys
from transcoder import push_to_hub
print(push_to_hub(sys.argv[1], "some-org/some-name", private=True, license="mit", token="hf_secret"))
"""
FETCH = """
import sys, torch
from transcoder import Transcoder
model = Transcoder.from_pretrained("some-org/some-name", revision=sys.argv[2] if len(sys.argv) > 2 else None)
torch.save(model.state_dict(), sys.argv[1])
for name, revision in (("some-org/nothing", None), ("some-org/some-name", "no-such-branch")):
    try:
        Transcoder.from_pretrained(name, revision=revision)
    except FileNotFoundError as error:
        assert f"{name}: no such folder here, and the hub did not give it" in str(error), error
    else:
        raise AssertionError(name)
"""


def small() -> Transcoder:
    model = Transcoder(TranscoderConfig(5, 4, 12, 3, activation="batch_topk", widths=[4, 12]), seed=1)
    model.threshold.fill_(0.5)
    return model.eval()


def run(code: str, *words: str, hub: str, cache: Path) -> str:
    settings = {"HF_ENDPOINT": hub, "HF_HOME": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0"}
    settings |= {"HF_HUB_DISABLE_XET": "1"}
    local = "127.0.0.1,localhost"
    environment = {**os.environ, **settings, "OMP_NUM_THREADS": "1", "NO_PROXY": local, "no_proxy": local}
    # The endpoint is read when huggingface_hub is first imported, so a process of its own.
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment, cwd=cache, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_what_was_pushed_is_fetched_bit_for_bit(tmp_path: Path) -> None:
    saved, cache = tmp_path / "saved", tmp_path / "cache"
    cache.mkdir()
    model = small()
    model.save_pretrained(saved)
    with HubServer() as hub:
        address = run(PUSH, str(saved), hub=hub.address, cache=cache)
        files = hub.files["some-org/some-name"]
        assert set(files) == {"transcoder.safetensors", "config.json", "hooks.json", "README.md"}
        assert address.endswith(hub.commit("some-org/some-name"))
        assert hub.private["some-org/some-name"]
        # huggingface.co takes weights of any size as large files.
        weights = hashlib.sha256(files["transcoder.safetensors"]).hexdigest()
        assert (set(hub.stored), hub.verified) == ({weights}, {weights})
        assert "Bearer hf_secret" in hub.tokens
        # The cache is empty of it: the fetch reads the server, by name and by commit.
        run(FETCH, str(tmp_path / "fetched.pt"), hub.commit("some-org/some-name"), hub=hub.address, cache=cache)
    fetched = torch.load(tmp_path / "fetched.pt", weights_only=True)
    assert all(torch.equal(tensor, fetched[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["name", "a/b/c", "/abs", "org/na me", "../up", ""])
def test_a_wrong_repository_name_is_refused_before_anything_is_sent(name: str) -> None:
    with pytest.raises(ValueError, match="expected 'org/name'"):
        push_to_hub(small(), name)


def test_a_folder_here_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small().save_pretrained(tmp_path / "org" / "name")
    assert Transcoder.from_pretrained("org/name").config.k == 3
    # A misspelt folder beside it is no name of the hub's either.
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        Transcoder.from_pretrained("org/nam")
    with pytest.raises(ValueError, match="revision"):
        Transcoder.from_pretrained(tmp_path / "org", revision="main")


def metadata(card: str) -> dict[str, object]:
    _, front, _ = card.split("---\n", 2)
    return dict(yaml.safe_load(front))


def test_the_card_shows_the_runs_figures() -> None:
    summary = {"evaluation/fvu": 0.36974, "duplicates/distinct_latents": 1604.0, "evaluation/l0": float("nan")}
    hooks = Hooks("blocks.8.hook_resid_mid", "blocks.8.hook_mlp_out", "google/gemma-2-2b")
    card = model_card(Source(small(), hooks, summary=summary, step=1200), "org/name", license="mit")
    assert metadata(card) == {
        "library_name": "transcoder",
        "tags": ["transcoder", "mechanistic-interpretability", "sparse-dictionary", "matryoshka"],
        "license": "mit",
        "base_model": "google/gemma-2-2b",
    }
    for text in (
        "| 0.3697 |",
        "| 1,604 |",
        "`blocks.8.hook_mlp_out`",
        'from_pretrained("org/name")',
        "`4, 12`",
        "`1200`",
    ):
        assert text in card
    assert "active latents a token" not in card


def test_what_files_say_stays_data_in_the_card() -> None:
    evil = "x` | <script>alert(1)</script>\n---\nlicense: stolen\n# Title"
    card = model_card(Source(small(), Hooks(evil, "a|b", evil)), "org/na--me", license="mit\nbase_model: evil")
    assert metadata(card)["license"] == "mit\nbase_model: evil"
    assert "base_model" not in metadata(card)
    body = card.split("---\n", 2)[2]
    lines = body.splitlines()
    assert sum(line.startswith("# ") for line in lines) == 1
    assert not any(line.startswith(("license", "---")) for line in lines)
    row = next(line for line in lines if line.startswith("| reads"))
    assert row.count("|") == 3
    assert row.count("`") == 2


def test_a_run_is_known_by_its_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints" / "step_00000040"
    small().save_pretrained(folder)
    (tmp_path / "run" / "config.yaml").write_text(
        "model: {name: demo}\nactivations: {source_hook: blocks.1.mlp.hook_in, target_hook: blocks.1.mlp.hook_out}\n"
    )
    (tmp_path / "run" / "summary.json").write_text('{"evaluation/fvu": 0.5}')
    found = load_source(folder)
    assert (found.step, found.hooks.source, found.summary["evaluation/fvu"]) == (40, "blocks.1.mlp.hook_in", 0.5)
    assert metadata(model_card(found, "org/name")).get("base_model") is None
