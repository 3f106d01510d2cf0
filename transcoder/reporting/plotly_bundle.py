"""The script that draws the charts: plotly.js as the installed package plotly has it, packed for the page with its licence."""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True)
class Bundle:
    packed: str
    """gzip, base64: a third of the size, and nothing in it can end an element."""
    digest: str
    """base64 of the SHA-256 of the script's text: the page's policy lets exactly this text run."""
    licence: str
    version: str


@lru_cache(maxsize=1)
def bundle() -> Bundle | None:
    """None where the package is not installed, or has no script."""
    try:
        # plotly itself is not imported: the file is all that is needed.
        spec = importlib.util.find_spec("plotly")
        package = importlib.metadata.distribution("plotly")
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    script = Path(spec.origin).parent / "package_data" / "plotly.min.js"
    try:
        data = script.read_bytes()
    except OSError:
        return None
    return Bundle(
        packed=base64.b64encode(gzip.compress(data, 6, mtime=0)).decode(),
        digest=base64.b64encode(hashlib.sha256(data).digest()).decode(),
        licence=_licence(package),
        version=package.version,
    )


def _licence(package: importlib.metadata.Distribution) -> str:
    for file in package.files or ():
        if file.name.upper().startswith("LICENSE"):
            try:
                return file.read_text()
            except OSError:
                break
    return "MIT License, Copyright Plotly, Inc. (the package's licence file was not found)"
