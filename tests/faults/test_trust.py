"""What comes from elsewhere is data and never code; what is secret stays so; nothing is read outside its folder."""

from __future__ import annotations

import ast
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.activations.test_cached import columns
from transcoder.activations.shards import read_header, write_shard
from transcoder.config import RunConfig
from transcoder.model import Transcoder, TranscoderConfig
from transcoder.reporting import MetricsWriter
from transcoder.tensor_file import read_tensors

ROOT = Path(__file__).resolve().parents[2]
LOADERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def keywords(call: ast.Call) -> dict[str, str]:
    return {k.arg: ast.unparse(k.value) for k in call.keywords if k.arg}


def test_nothing_in_the_package_can_load_a_pickle_or_run_text() -> None:
    files = [*ROOT.glob("transcoder/**/*.py"), *ROOT.glob("kernels/**/*.py")]
    assert len(files) > 100
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for name, call in calls(tree):
            said = keywords(call)
            assert name.split(".")[0] not in LOADERS, (path, name)
            assert name not in ("eval", "exec", "os.system", "yaml.unsafe_load", "yaml.full_load"), (path, name)
            # `allow_pickle` is the flag that has to be given by name.
            assert name != "torch.load" or said.get("weights_only") in ("True", "not allow_pickle"), path
            assert not name.endswith(("np.load", "numpy.load")) or said.get("allow_pickle", "False") == "False", path
            assert name != "yaml.load" or said.get("Loader") == "_Loader", path
            assert said.get("trust_remote_code", "False") == "False", path
            assert said.get("shell", "False") == "False", path


@pytest.mark.parametrize("name", ["transcoder.safetensors", "trainer.safetensors"])
def test_a_pickle_in_the_place_of_a_checkpoints_file_is_not_run(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    torch.save({"W_enc": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=f"{name}: not a safetensors file"):
        read_tensors(path)


def damaged_header(data: bytes, draw: random.Random) -> bytes:
    """The file with another header: cut, flipped, with other names, types, shapes or offsets, or with a wrong length."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = bytearray(data[8 : 8 + size]), data[8 + size :]
    kind = draw.randrange(6)
    if kind == 0:
        return struct.pack("<Q", draw.choice([0, 1, size - 1, size + 1, 2**31, 2**40, 2**63, 2**64 - 1])) + data[8:]
    if kind == 1:
        header[draw.randrange(size)] = draw.randrange(256)
    elif kind == 2:
        at = draw.randrange(size)
        header[at : at + draw.randrange(1, 16)] = draw.randbytes(draw.randrange(16))
    else:
        entries = json.loads(bytes(header))
        name = draw.choice([n for n in entries if n != "__metadata__"])
        if kind == 3:
            entries[name]["shape"] = draw.choice([[], [-1], [2**62, 4], [0], "x", None, [1.5], [10**30]])
        elif kind == 4:
            entries[name]["data_offsets"] = draw.choice(
                [[0, 0], [-1, 4], [5, 1], [0, 2**63], [], None, [0, len(body) + 9]]
            )
        else:
            entries[name]["dtype"] = draw.choice(["F31", "", None, 7, "F64", "BOOL", "../x"])
        header = bytearray(json.dumps(entries).encode())
    return struct.pack("<Q", len(header)) + bytes(header) + body


def test_damaged_headers_are_refused_by_name(tmp_path: Path) -> None:
    """500 of each: as a state without its checksum, as a shard, as a saved transcoder."""
    draw = random.Random(3)
    state, shard, saved = tmp_path / "state.safetensors", tmp_path / "shard.safetensors", tmp_path / "saved"
    save_file({"a": torch.ones(4, 3), "b": torch.zeros(5, dtype=torch.int64)}, state)
    write_shard(shard, **columns(0, 2))
    model = Transcoder(TranscoderConfig(d_in=4, d_out=3, d_sae=8, k=2), seed=0)
    model.save_pretrained(saved)
    readers = [
        (state, lambda: {n: tuple(t.shape) for n, t in read_tensors(state).items()}),
        (shard, lambda: read_header(shard)),
        (saved / "transcoder.safetensors", lambda: sorted(Transcoder.from_pretrained(saved).state_dict())),
    ]
    refused = 0
    for path, read in readers:
        whole, good = path.read_bytes(), read()
        for _ in range(500):
            path.write_bytes(damaged_header(whole, draw))
            found, said = None, ""
            try:
                found = read()
            except ValueError as error:
                said = str(error)
            if found is None:
                assert path.name in said
                refused += 1
                continue
            # A changed letter of a name, or of what is no part of the content.
            assert len(str(found)) < 4 * len(str(good))
        path.write_bytes(whole)
    assert refused > 1200


SECRETS = {
    "WANDB_API_KEY": "5ec2e7" + "0" * 34,
    "HF_TOKEN": "hf_doNotShowThisToken123",
    "MY_SERVICE_PASSWORD": "swordfish-and-more",
}

LEAKY = """
import os, sys
print("login with", os.environ["WANDB_API_KEY"], file=sys.stderr)
raise RuntimeError("401 for key " + os.environ["WANDB_API_KEY"] + " and token " + os.environ["HF_TOKEN"])
"""


def test_secrets_are_in_no_file_and_no_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even where W&B itself tells them, in its error and on its standard error."""
    (tmp_path / "fake" / "wandb").mkdir(parents=True)
    (tmp_path / "fake" / "wandb" / "__init__.py").write_text(LEAKY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    run = tmp_path / "run"
    with MetricsWriter(run, RunConfig(name="secret").replace({"logging.wandb": "offline"})) as writer:
        writer.write(1, {"x": 1.0})
    assert "W&B: RuntimeError: 401 for key ***" in caplog.text
    for value in SECRETS.values():
        assert value not in caplog.text
        for file in run.rglob("*"):
            assert not file.is_file() or value.encode() not in file.read_bytes(), file


@pytest.mark.slow
def test_a_whole_run_leaves_no_secret_in_its_folder(tmp_path: Path) -> None:
    """With the real W&B, which writes down much about its surroundings."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from planted_run import Planted, config\n"
        "from transcoder.training import train_transcoder\n"
        "settings = config(training__steps=4, antidup__verify_at_step=4, logging__wandb='offline', logging__report=True)\n"
        "train_transcoder(settings, sys.argv[2], batches=Planted())\n"
    )
    environment = {n: v for n, v in os.environ.items() if not n.startswith("WANDB_")} | SECRETS
    environment |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(tmp_path), "TRANSCODER_BACKEND": "torch"}
    words = [sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path / "run")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert any(p.suffix == ".wandb" for p in files)
    assert any(p.name == "report.html" for p in files)
    for value in SECRETS.values():
        assert value not in done.stdout + done.stderr
        for file in files:
            assert value.encode() not in file.read_bytes(), file
