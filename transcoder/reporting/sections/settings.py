"""Every setting, and every figure that was logged."""

from __future__ import annotations

import yaml

from transcoder.reporting.html import escape, table
from transcoder.reporting.numbers import number
from transcoder.reporting.runfolder import RunFolder


def section(run: RunFolder) -> str:
    config = (
        yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else "config.yaml is not there."
    )
    rows = [[f"<code>{escape(name)}</code>", number(run.figure(name))] for name in run.figure_names()]
    logged = table(["Name", "Last value"], rows, numeric=[1]) if rows else '<p class="empty">Nothing was logged.</p>'
    events = [
        [
            number(e.get("step") if isinstance(e.get("step"), int) else None),
            escape(e.get("event")),
            escape(", ".join(f"{k}: {v}" for k, v in p.items()) if isinstance(p := e.get("payload"), dict) else ""),
        ]
        for e in run.metrics.events[-50:]
    ]
    happened = (
        table(["Step", "Event", ""], events, numeric=[0]) if events else '<p class="empty">None were recorded.</p>'
    )
    return (
        f"<details><summary>Settings (config.yaml)</summary><pre>{escape(config)}</pre></details>"
        f"<details><summary>Every figure that was logged ({len(rows)})</summary>{logged}</details>"
        f"<details><summary>Events ({len(run.metrics.events)})</summary>{happened}</details>"
    )
