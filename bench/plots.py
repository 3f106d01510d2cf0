"""The plots of docs/performance.md, as SVG. The same data makes the same bytes (with the same matplotlib)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.results import label

OURS, OTHERS = "#1b6ca8", ["#d1495b", "#edae49", "#66a182", "#8d6a9f", "#5c5c5c", "#c06c3e"]
SETTINGS = {
    "svg.hashsalt": "bench",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
}
LIBRARIES = {"saelens": "SAELens", "sparsify": "sparsify", "dictionary_learning": "dictionary_learning"}
"""Names of the peers by their environment."""
AXES = {"d_sae": "latents N", "rows": "batch B", "k": "k", "d": "d"}


def draw(found: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Every plot that the files have the data for."""
    import matplotlib

    matplotlib.use("svg")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(SETTINGS):
        for one in found:
            for name, make in PLOTS.items():
                figure = make(one)
                if figure is not None:
                    path = folder / f"{one['device']['slug']}-{name}.svg"
                    figure.savefig(path, metadata={"Date": None, "Creator": None}, bbox_inches="tight")
                    written.append(path)
    return written


def _figure(rows: int = 1, columns: int = 1, width: float = 8.0, height: float = 3.0) -> tuple[Any, Any]:
    # Not pyplot, which keeps global state and needs figures to be closed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _steps(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in found.get("rows", {}).get("rows", []) if row["operation"] == "step"]


def of_libraries(found: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """{the kind of step: {who: its time}} at the largest size: ours, eager PyTorch, and the fastest variant of each library."""
    steps = _steps(found)
    largest = max((row["size"]["d_sae"] * row["size"]["d"] for row in steps), default=0)
    chosen: dict[str, dict[str, dict[str, Any]]] = {}
    for row in steps:
        if row["size"]["d_sae"] * row["size"]["d"] != largest or "environment" in row:
            continue
        selection = {"topk": "TopK", "batch_topk": "BatchTopK"}.get(row["activation"], row["activation"])
        bars: dict[str, dict[str, Any]] = {}
        for name, one in row["variants"].items():
            who = LIBRARIES.get(one.get("environment", ""), name)
            if "wrong" in one or (one["ours"] and (who in LIBRARIES.values() or "this package" in bars)):
                continue
            if one["ours"]:
                who = "this package"
            elif who not in (*LIBRARIES.values(), "eager PyTorch"):
                continue
            if who not in bars or one["ratio"]["forward"]["median"] < bars[who]["ratio"]["forward"]["median"]:
                bars[who] = one
        chosen[f"{selection}, Matryoshka" if len(row.get("widths", ())) > 1 else selection] = bars
    return chosen


def speed(found: dict[str, Any]) -> Any:
    """The picture of the first screen: the step's time compared with the libraries', at the largest size."""
    kinds = of_libraries(found)
    if not kinds:
        return None
    size = max((row["size"] for row in _steps(found)), key=lambda size: size["d_sae"])
    figure, axes = _figure(height=0.9 + 0.24 * sum(len(bars) + 1 for bars in kinds.values()))
    axis, place, ticks = axes[0][0], 0.0, []
    for kind, bars in kinds.items():
        axis.text(0.0, place, kind, fontweight="bold", va="center")
        for who, one in sorted(bars.items(), key=lambda item: item[1]["ratio"]["forward"]["median"]):
            place -= 1
            ratio = one["ratio"]["forward"]["median"]
            axis.barh(place, ratio, color=OURS if one["ours"] else "#b8bec6", height=0.75)
            axis.text(ratio + 0.08, place, f"{ratio:.1f}", va="center")
            ticks.append((place, who))
        place -= 1.2
    axis.set_yticks([p for p, _ in ticks], [n for _, n in ticks])
    axis.tick_params(left=False, bottom=False, labelbottom=False)
    axis.spines["bottom"].set_visible(False)
    axis.set_ylim(place + 0.6, 0.7)
    device = found["device"]
    axis.set_title(
        f"Time of a training step, as a multiple of this package's (shorter is faster)\n{device['name']}, "
        f"{device['cores']} cores; {size['rows']} tokens, d {size['d']}, {size['d_sae']} latents, k {size['k']}",
        loc="left",
        fontsize=9,
    )
    return figure


def peers(found: dict[str, Any]) -> Any:
    """Time of a step as a multiple of ours."""
    steps = _steps(found)
    if not steps:
        return None
    bars = sum(len(row["variants"]) for row in steps)
    figure, axes = _figure(height=1 + 0.2 * (bars + 2 * len(steps)))
    axis, place, ticks = axes[0][0], 0.0, []
    for row in steps:
        axis.text(0.0, place, label(row), fontweight="bold", va="center", transform=axis.get_yaxis_transform())
        place -= 1
        for name, one in row["variants"].items():
            if "wrong" in one or (one["ours"] and "environment" in one):
                continue
            ratio = one["ratio"]["forward"]
            spread = [[ratio["median"] - ratio["low"]], [ratio["high"] - ratio["median"]]]
            axis.barh(
                place,
                ratio["median"],
                xerr=spread,
                color=OURS if one["ours"] else OTHERS[0],
                height=0.7,
                ecolor="black",
            )
            ticks.append((place, f"{name} *" if "environment" in one else name))
            place -= 1
        place -= 0.5
    axis.set_yticks([p for p, _ in ticks], [n for _, n in ticks])
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_ylim(place, 1)
    axis.set_xlabel(
        "time of a step, multiples of ours (lines to the quartiles; *: of ours in the environment of its own)"
    )
    return figure


def floor(found: dict[str, Any]) -> Any:
    """Our time as a multiple of the floor, by operation and size."""
    rows = [row for row in found.get("rows", {}).get("rows", []) if "variants" in row]
    if not rows:
        return None
    figure, axes = _figure(height=0.8 + 0.25 * len(rows))
    axis = axes[0][0]
    for place, row in enumerate(rows):
        one = next(iter(row["variants"].values()))
        direction = "both" if "both" in one["seconds"] else "forward"
        least = row["floor"][direction]["seconds"]
        middle, low, high = (one["seconds"][direction][n] / least for n in ("median", "low", "high"))
        axis.errorbar(middle, -place, xerr=[[middle - low], [high - middle]], fmt="o", color=OURS, ecolor="black", ms=5)
    axis.set_yticks([-n for n in range(len(rows))], [label(row) for row in rows])
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_ylim(0.5 - len(rows), 0.5)
    axis.set_xlabel(
        "times slower than this machine's limit for the same bytes and operations (log; lines to the quartiles)"
    )
    return figure


def monitoring(found: dict[str, Any]) -> Any:
    """Time of the trainer's step with parts on, as a multiple of all off."""
    rows = [row for row in found.get("rows", {}).get("rows", []) if row["operation"] == "training"]
    if not rows:
        return None
    kinds = list(rows[0]["kinds"])
    figure, axes = _figure(height=2.6)
    axis = axes[0][0]
    for number, row in enumerate(rows):
        size = row["size"]
        places = [n + 0.8 * number / len(rows) for n in range(len(kinds))]
        ratio = [row["kinds"][kind]["ratio"] for kind in kinds]
        spread = [[r["total"] - r["low"] for r in ratio], [r["high"] - r["total"] for r in ratio]]
        axis.bar(
            places,
            [r["total"] for r in ratio],
            yerr=spread,
            width=0.7 / len(rows),
            color=[OURS, *OTHERS][number],
            label=f"d {size['d']}, N {size['d_sae']}, k {size['k']}",
        )
    axis.set_xticks([n + 0.4 * (1 - 1 / len(rows)) for n in range(len(kinds))], kinds)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_ylabel("time of all steps, multiples of off (95 %)")
    axis.legend(frameon=False)
    return figure


def _curves(
    axis: Any, points: list[dict[str, Any]], value: Callable[[dict[str, Any]], dict[str, float] | None]
) -> None:
    names = list(dict.fromkeys(name for point in points for name in point["variants"]))
    others = [name for name in names if not name.startswith("ours")]
    for name in names:
        known = [(p["value"], value(p["variants"][name])) for p in points if name in p["variants"]]
        drawn = [(x, v) for x, v in known if v is not None]
        if not drawn:
            continue
        default = name == names[0]
        color = OURS if name.startswith("ours") else OTHERS[others.index(name) % len(OTHERS)]
        style = "-" if default or name in others else ":"
        axis.plot(
            [x for x, _ in drawn], [v["median"] for _, v in drawn], style, color=color, marker="o", ms=3, label=name
        )
        axis.fill_between(
            [x for x, _ in drawn],
            [v["low"] for _, v in drawn],
            [v["high"] for _, v in drawn],
            color=color,
            alpha=0.15,
            lw=0,
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    if axis.lines:
        axis.legend(frameon=False, fontsize=7)


def scaling(found: dict[str, Any]) -> Any:
    points = found.get("scaling", {}).get("points", [])
    panels = list(dict.fromkeys((p["axis"], p["operation"]) for p in points))
    if not panels:
        return None
    rows = -(-len(panels) // 3)
    figure, axes = _figure(rows, 3, width=11, height=2.8 * rows)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (along, operation) in zip(axes.flat, panels, strict=False):
        mine = [p for p in points if (p["axis"], p["operation"]) == (along, operation)]
        fixed = {AXES[n][-1] if n in ("d_sae", "rows") else n: v for n, v in mine[0]["size"].items() if n != along}
        _curves(axis, mine, lambda one: {k: 1e3 * v for k, v in one["seconds"].items()})
        axis.set_title(f"{operation} ({', '.join(f'{n} {v}' for n, v in fixed.items())})", fontsize=8)
        axis.set_xlabel(AXES[along])
        axis.set_ylabel("ms")
    return figure


def memory(found: dict[str, Any]) -> Any:
    points = [p for p in found.get("scaling", {}).get("points", []) if p["axis"] == "d_sae"]
    points = [p for p in points if p["operation"] in ("step", "encode")]
    if not points:
        return None
    figure, axes = _figure(1, 2, width=9, height=3)
    for axis, operation in zip(axes.flat, ("step", "encode"), strict=True):
        mine = [p for p in points if p["operation"] == operation]
        _curves(axis, mine, _peak)
        axis.set_title(operation, fontsize=8)
        axis.set_xlabel(AXES["d_sae"])
        axis.set_ylabel("peak MB beyond weights and moments")
    return figure


def _peak(one: dict[str, Any]) -> dict[str, float] | None:
    if not one["peak_bytes"]:
        return None
    return dict.fromkeys(("median", "low", "high"), one["peak_bytes"] / 1e6)


PLOTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "speed": speed,
    "peers": peers,
    "floor": floor,
    "monitoring": monitoring,
    "scaling": scaling,
    "memory": memory,
}
