"""One file that shows what it is given: templates/ filled by jinja2, styles, script, data and the chart library inside."""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transcoder.reporting.charts import LOOK
from transcoder.reporting.format import number, percent, real

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = ("base", "charts", "cards", "latents", "pairs", "main")
"""The page's own script, in this order (templates/<name>.js)."""
# HTML has no way to write these (a NUL ends up as U+FFFD in any case); shown as their pictures, U+2400 and on.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@lru_cache(maxsize=1)
def environment() -> Environment:
    """The templates. Every value is escaped; `tojson` leaves no `<`, `>`, `&` or `'` and refuses NaN (ValueError).

    Filters: `number` and `percent` take any value of a file, "–" where it is no finite number.
    """
    from jinja2 import ChainableUndefined, Environment, FileSystemLoader

    env = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        # A report may lack any field: what is not there is shown as "–".
        undefined=ChainableUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    env.filters["number"] = lambda value: number(real(value))
    env.filters["percent"] = lambda value: percent(real(value))
    return env


def render(template: str, **values: Any) -> Markup:
    """One template of the folder, as text that needs no more escaping."""
    from markupsafe import Markup

    return Markup(environment().get_template(template).render(values))


def render_page(core: Mapping[str, Any], packed: Mapping[str, str], *, live: bool = False) -> str:
    """The page as text. Its content security policy lets only its own two scripts run.

    Args:
        core: {"title", "header": see templates/header.html, "sections": [{"id", "title", "html"}], "version": of the latents}.
        packed: element id -> gzip in base64, unpacked when it is needed.
        live: the page asks the address it came from for news; otherwise its policy forbids every request.
    """
    script = "\n".join(["(() => {", '"use strict";', *(_text(f"{name}.js") for name in SCRIPTS), "start();", "})();"])
    scripts, library, licences = [script.encode()], plotly(), []
    if library is not None:
        scripts.append(library.script)
        licences.append((f"plotly.js (plotly {library.version})", library.licence))
        packed = {**packed, "plotly": library.packed}
    return render(
        "page.html",
        **core,
        digests=[base64.b64encode(hashlib.sha256(text).digest()).decode() for text in scripts],
        live=live,
        data={"live": live, "version": core.get("version", 0), "look": LOOK},
        licences=licences,
        style=_text("page.css"),
        script=script,
        packed=packed,
    )


def pack(data: bytes) -> str:
    """gzip (without a time, so that the same page has the same bytes), base64: nothing in it can end an element."""
    # Level 6 takes three times as long for 8 % fewer bytes.
    return base64.b64encode(gzip.compress(data, 4, mtime=0)).decode()


class Library(NamedTuple):
    script: bytes
    packed: str
    version: str
    licence: str


@lru_cache(maxsize=1)
def plotly() -> Library | None:
    """plotly.js as the installed package plotly has it; None where there is none. The package itself is not imported."""
    try:
        spec = importlib.util.find_spec("plotly")
        package = importlib.metadata.distribution("plotly")
        script = (Path(spec.origin).parent / "package_data/plotly.min.js").read_bytes() if spec and spec.origin else b""
        files = [file for file in package.files or () if file.name.upper().startswith("LICENSE")]
        none = "MIT License, Copyright Plotly, Inc. (no licence file was found)"
        licence = files[0].read_text(encoding="utf-8") if files else none
    except (ImportError, ValueError, OSError):
        return None
    return Library(script, pack(script), package.version, licence) if script else None


def chunk_elements(index: str, chunks: Sequence[str]) -> dict[str, str]:
    """Packed latents by the ids of their elements."""
    return {"latent-index": index, **{f"chunk-{n}": text for n, text in enumerate(chunks)}}


def _printable(value: Any) -> Any:
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return _CONTROL.sub(lambda m: chr(0x2400 + min(ord(m[0]), 0x21)), value)


def _text(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")
