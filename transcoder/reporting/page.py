"""One file that shows what it is given: styles, script, data and the chart library inside, a policy that forbids all else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transcoder.reporting.html import embedded_json, escape
from transcoder.reporting.plotly_bundle import bundle

_TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = ("base", "charts", "blocks", "cards", "latents", "pairs", "live", "main")
"""The page's own script, in this order (templates/<name>.js)."""


def render_page(core: Mapping[str, Any], packed: Mapping[str, str], *, live: bool = False) -> str:
    """The page as text.

    Args:
        core: {"title", "header", "sections": [{"id", "title", "blocks"}], ...}, what the script draws at once.
        packed: element id -> gzip in base64, unpacked when it is needed.
        live: the page asks the address it came from for news; otherwise its policy forbids every request.
    """
    script = "\n".join(["(() => {", '"use strict";', *map(_script, SCRIPTS), "start();", "})();"])
    charts = bundle()
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()]
    parts = dict(packed)
    if charts is not None:
        digests.append(charts.digest)
        parts["plotly"] = charts.packed
    own, asks = " ".join(f"'sha256-{d}'" for d in digests), "'self'" if live else "'none'"
    policy = (
        f"default-src 'none'; script-src {own}; style-src 'unsafe-inline'; img-src data: blob:; connect-src {asks}; "
        "base-uri 'none'; form-action 'none'"
    )
    licences = [] if charts is None else [{"name": f"plotly.js (plotly {charts.version})", "text": charts.licence}]
    slots = {
        "policy": policy,
        "title": escape(core["title"]),
        "style": _template("page.css"),
        "data": embedded_json({**core, "live": live, "licences": licences}),
        "script": script,
        "packed": "".join(
            f'<script type="text/plain" id="{escape(name)}">{text}</script>\n' for name, text in parts.items()
        ),
    }
    # Split before filling: what comes from data can never be taken for a slot.
    page = _template("page.html").split("%%")
    return "".join(slots[part] if n % 2 else part for n, part in enumerate(page))


def chunk_elements(index: str, chunks: Sequence[str]) -> dict[str, str]:
    """Packed latents by the ids of their elements."""
    return {"latent-index": index, **{f"chunk-{n}": text for n, text in enumerate(chunks)}}


def _script(name: str) -> str:
    return _template(f"{name}.js")


def _template(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")
