"""The folder of a layer set: its layers' run folders, their metrics in one table, and a page that leads to theirs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transcoder.layer_list import LAYERS_FOLDER, layer_folders
from transcoder.reporting.format import number, percent, real
from transcoder.reporting.run import Run

COLUMNS = (
    ("evaluation/fvu", "FVU", number),
    ("evaluation/baseline_linear_fvu", "linear map's FVU", number),
    ("evaluation/ce_recovered", "CE recovered", percent),
    ("evaluation/l0", "L0", number),
    ("sparsity/dead_share", "dead", percent),
    ("heldout_duplicates/pairs", "correlated pairs", number),
    ("heldout_duplicates/mergeable", "duplicates", number),
)
"""Of each layer: its own metrics, those of a finished run on held-out tokens with the final weights."""


def mean_over_layers(metrics: Mapping[int, Mapping[str, Any]]) -> dict[str, float]:
    """The means of the numbers that every layer has."""
    each = list(metrics.values())
    names = [name for name in each[0] if all(_is_number(one.get(name)) for one in each)] if each else []
    return {name: sum(one[name] for one in each) / len(each) for name in names if "/" in name}


def set_table(path: str | Path) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of a set's layers, from their run folders: of running layers the values so far."""
    rows = []
    for layer, folder in layer_folders(path).items():
        run = Run(folder)
        values = [form(real(run.metric(name))) for name, _, form in COLUMNS]
        rows.append([str(layer), *values, str(run.last_step or 0), run.status])
    return ["layer", *(label for _, label, _ in COLUMNS), "steps", "status"], rows


def set_lines(summary: Mapping[str, Any]) -> list[str]:
    """In words, what the whole set costs the language model, and which layers ended before the others."""
    lines = []
    if "set/ce_transcoder" in summary:
        model, ours = summary["set/ce_model"], summary["set/ce_transcoder"]
        recovered = summary.get("set/ce_recovered")
        share = "" if recovered is None else f": {recovered:.1%} recovered"
        lines.append(f"cross-entropy with all layers replaced at once {ours:.4f} nats, of the model {model:.4f}{share}")
    return [*lines, *(f"ended: {why}" for why in summary.get("ended", {}).values())]


def set_page(run: Run, header: Mapping[str, Any], links: bool) -> dict[str, Any]:
    """What the page of a set shows under a run's `header`, see `render_page`: the table of layers; `links` lead to theirs."""
    from markupsafe import Markup

    from transcoder.reporting.page import render

    head, rows = set_table(run.path)
    for row, folder in zip(rows, layer_folders(run.path).values(), strict=True):
        if links and (folder / "report.html").is_file():
            row[0] = Markup('<a href="{}/{}/report.html">{}</a>').format(LAYERS_FOLDER, folder.name, row[0])
    lead = " ".join(line[0].upper() + line[1:] + "." for line in set_lines(run.final))
    table = {"head": head, "rows": rows, "caption": "Layers", "numeric": range(1, len(head) - 1)}
    return {
        "title": f"{run.name}: layer set",
        "header": {
            **header,
            "eyebrow": "Layer set",
            "facts": [f"{len(rows)} layers", header["facts"][0]],
        },
        "sections": [
            {"id": "layers", "title": "Layers", "html": render("sections/plain.html", lead=lead, table=table)}
        ],
    }


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
