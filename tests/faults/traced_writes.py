"""`python traced_writes.py FOLDER`, for test_fsync.py: a run, a cache and a saved transcoder, with every fsync and rename of
this process and of those that it starts written down in FOLDER/trace.jsonl."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TRACER = """
import json, os

def state(path):
    found = os.stat(path)
    return [found.st_ino, found.st_size, found.st_mtime_ns]

def note(*event):
    with open(os.environ["TRACED_WRITES"], "a") as log:
        log.write(json.dumps(event) + "\\n")

def files_of(path):
    inside = [os.path.join(place, name) for place, _, names in os.walk(path) for name in names]
    return inside if os.path.isdir(path) else [path]

def renaming(inside):
    def rename(old, new, **options):
        moved = {os.fspath(path): state(path) for path in files_of(old)}
        inside(old, new, **options)
        note("rename", os.fspath(new), os.stat(os.path.dirname(os.path.abspath(new))).st_ino, moved)
    return rename

def syncing(inside):
    def fsync(descriptor):
        inside(descriptor)
        found = os.fstat(descriptor)
        note("fsync", [found.st_ino, found.st_size, found.st_mtime_ns])
    return fsync

os.fsync, os.replace, os.rename = syncing(os.fsync), renaming(os.replace), renaming(os.rename)
"""


def write_everything(folder: Path) -> None:
    import torch
    from planted_run import Planted, config

    from transcoder.activations.shards import write_index, write_shard
    from transcoder.training import train_transcoder

    settings = config(
        training__steps=12,
        training__similarity_tokens=256,
        antidup__samples__save_frequency=6,
        antidup__verify_at_step=8,
        checkpoint__every=6,
        checkpoint__second_location=str(folder / "second"),
        logging__report=True,
    )
    result = train_transcoder(settings, folder / "run", batches=Planted())
    result.transcoder.save_pretrained(folder / "saved")
    rows, numbers = torch.ones(4, 3), torch.arange(4)
    write_shard(folder / "cache" / "a.safetensors", rows, rows, numbers, numbers)
    write_index(folder / "cache")


if __name__ == "__main__":
    place = Path(sys.argv[1])
    if "TRACED_WRITES" in os.environ:
        write_everything(place)
    else:
        # Python runs a module of this name at its start: here, and in the process that writes report.html.
        (place / "tracer").mkdir()
        (place / "tracer" / "sitecustomize.py").write_text(TRACER)
        path = os.pathsep.join([str(place / "tracer"), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "TRACED_WRITES": str(place / "trace.jsonl")}
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment).returncode)
