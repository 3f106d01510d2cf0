"""Every setting, and every figure that was logged."""

from __future__ import annotations

import yaml

from transcoder.reporting.elements import Block, details, table, text
from transcoder.reporting.format import number
from transcoder.reporting.run import Run

EVENTS = 50


def section(run: Run) -> list[Block]:
    config = (
        yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True)
        if run.config
        else "config.yaml is not there."
    )
    rows = [[name, number(run.metric(name))] for name in run.metric_names()]
    logged = table(["Name", "Last value"], rows, [1]) if rows else text("Nothing was logged.", "empty")
    events = [
        [
            number(e.get("step") if isinstance(e.get("step"), int) else None),
            str(e.get("event")),
            ", ".join(f"{k}: {v}" for k, v in p.items()) if isinstance(p := e.get("payload"), dict) else "",
        ]
        for e in run.metrics.events[-EVENTS:]
    ]
    happened = table(["Step", "Event", ""], events, [0]) if events else text("None were recorded.", "empty")
    return [
        details("Settings (config.yaml)", [text(config, "code")]),
        details(f"Every figure that was logged ({len(rows)})", [logged]),
        details(f"Events ({len(run.metrics.events)})", [happened]),
    ]
