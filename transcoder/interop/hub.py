"""To the Hugging Face hub: `push_to_hub` and the model card of the weights. `Transcoder.from_pretrained` fetches them."""

from __future__ import annotations

import math
import re
import tempfile
from dataclasses import asdict
from pathlib import Path

import yaml

from transcoder.interop.export_source import HOOKS_FILE, Exportable, Source, load_source
from transcoder.interop.files import write_json

CARD_FILE = "README.md"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_METRICS = {
    "evaluation/fvu": "fraction of variance unexplained, held-out tokens",
    "evaluation/baseline_linear_fvu": "the same of a least-squares linear map",
    "evaluation/l0": "active latents a token",
    "evaluation/live_share": "share of latents that fire",
    "evaluation/ce_recovered": "cross-entropy recovered with the transcoder in the layer's place",
    "duplicates/distinct_latents": "distinct latents",
    "duplicates/share_of_live": "share of live latents with a duplicate",
    "duplicates/effective_dictionary_size": "effective dictionary size",
}


def push_to_hub(
    source: Exportable,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload a transcoder",
    license: str | None = None,
) -> str:
    """Upload a transcoder with a generated model card; `Transcoder.from_pretrained(repo_id)` loads it again.

    Uploaded are the weights, their config, where they belong (hooks.json) and README.md. No path or other setting of the run is
    uploaded, except the metrics and names that the card shows.

    Args:
        source: a Transcoder, a run folder (its newest checkpoint), a checkpoint, or a saved folder.
        repo_id: "org/name"; made where it does not exist yet, `private` as the hub's default says or as given.
        revision: a branch that exists; None is main.
        token: of the hub; None takes what `hf auth login` left, or HF_TOKEN.
        license: an identifier of the hub's, such as "mit", for the card.

    Returns: the address of the commit.

    Raises:
        ValueError: repo_id is no "org/name".   ImportError: huggingface_hub is missing.
        OSError: the hub refused or could not be reached (huggingface_hub's own classes).
    """
    if _REPOSITORY.fullmatch(repo_id) is None:
        raise ValueError(f"push_to_hub: repo_id: expected 'org/name', got {repo_id!r}")
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError("push_to_hub: huggingface_hub is not installed: pip install huggingface_hub") from error
    loaded = load_source(source)
    hub = HfApi(token=token, library_name="transcoder")
    with tempfile.TemporaryDirectory() as folder:
        write_hub_folder(loaded, Path(folder), repo_id, license=license)
        hub.create_repo(repo_id, private=private, exist_ok=True)
        done = hub.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message)
    return str(done.commit_url)


def write_hub_folder(source: Source, folder: Path, repo_id: str, *, license: str | None = None) -> None:
    """What `push_to_hub` uploads, written into an existing folder."""
    source.model.save_pretrained(folder)
    write_json(folder / HOOKS_FILE, asdict(source.hooks))
    (folder / CARD_FILE).write_text(model_card(source, repo_id, license=license), encoding="utf-8")


def model_card(source: Source, repo_id: str, *, license: str | None = None) -> str:
    """README.md: YAML metadata, what it is, the run's metrics from summary.json, how to load it.

    Names and metrics come from files: each is written as one escaped line.
    """
    config, hooks = source.model.config, source.hooks
    nested = len(config.widths or ()) > 1
    label = source.model.selection.label
    tags = ["transcoder", "mechanistic-interpretability", "sparse-dictionary", *(["matryoshka"] if nested else [])]
    metadata = {
        "library_name": "transcoder",
        "tags": tags,
        **({"license": license} if license is not None else {}),
        # Other names are of local folders.
        **({"base_model": hooks.model_name} if _REPOSITORY.fullmatch(hooks.model_name or "") else {}),
    }
    facts: dict[str, object] = {
        "reads": hooks.source,
        "writes": hooks.target,
        "language model": hooks.model_name,
        "widths d_in, d_sae, d_out": f"{config.d_in}, {config.d_sae}, {config.d_out}",
        "selection": f"{label}, k = {config.k}",
        "Matryoshka widths": ", ".join(map(str, config.widths or ())) if nested else None,
        "skip connection": "yes" if config.skip else None,
        "training step": source.step,
    }
    sections = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---",
        # Nothing in the name is read as HTML or Markdown.
        "# " + re.sub(r"([\\`*_{}\[\]<>()#+!|~-])", r"\\\1", _line(repo_id.split("/")[1])),
        f"A {'Matryoshka ' if nested else ''}{label} transcoder: it predicts one activation of a language model from another "
        "through sparse latents.",
        _table(("", ""), [(name, _code(value)) for name, value in facts.items() if value is not None]),
        f'## Load\n\n```python\nfrom transcoder import Transcoder\n\nmodel = Transcoder.from_pretrained("{repo_id}")\n'
        "codes = model.encode(x)  # x [B, d_in], raw activations\ny_hat = model(x)  # [B, d_out]\n```",
    ]
    metrics = [(what, _number(source.summary.get(name))) for name, what in _METRICS.items()]
    if known := [(what, value) for what, value in metrics if value]:
        table = _table(("metric", "value"), known)
        sections.append(f"## Metrics\n\nFrom the run's summary.json, held-out non-sink tokens.\n\n{table}")
    return "\n\n".join(sections) + "\n"


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines)


def _line(value: object) -> str:
    """One line without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def _code(value: object) -> str:
    """One line as inline code in a table's cell: backticks and bars would end either."""
    text = _line(value)
    return f"`{text.replace('`', chr(39)).replace('|', '/')}`" if text else ""


def _number(value: object) -> str:
    """Empty for what is no finite number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
