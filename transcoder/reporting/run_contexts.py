"""Contexts of a latent: tokens, where in them it fires and how strongly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from transcoder.reporting.run_tables import safe, visible
from transcoder.reporting.sample_table import SampleTable

WIDE = 100
"""Characters of a context that one line of text shows."""
_SHADE = "255,140,0"
"""Lies on a light page and on a dark one alike."""


@dataclass(frozen=True, eq=False)
class Context:
    """One kept sample of a latent.

    Fields:
        kind: "top" for one of its strongest, "stratified" for one drawn over positions.
        tokens: display strings, padding left out.
        anchor: the place in `tokens` of the token that the sample was kept for.
        activation: at the anchor.
        activations: [tokens] float64: what was kept at each token, the latent's other samples of the same sequence included;
            NaN where none was, which is not a zero.
        position: of the anchor in its sequence.
        sequence: number of the sequence, -1 where unknown.
        step: the training step that saw it.
    """

    kind: Literal["top", "stratified"]
    tokens: list[str]
    anchor: int
    activation: float
    activations: NDArray[np.float64]
    position: int
    sequence: int
    step: int

    @property
    def text(self) -> str:
        return "".join(self.tokens)

    def __repr__(self) -> str:
        return f"{self.activation:9.4g}  {self.marked()}"

    def marked(self, wide: int = WIDE) -> str:
        """The context on one line, its token in brackets »«, cut to about `wide` characters around it."""
        before = visible("".join(self.tokens[: self.anchor]))
        token = f"»{visible(self.tokens[self.anchor])}«"
        after = visible("".join(self.tokens[self.anchor + 1 :]))
        room = max(0, wide - len(token))
        left = before if len(before) <= room * 2 // 3 else "…" + before[len(before) - room * 2 // 3 :]
        rest = room - len(left)
        return left + token + (after if len(after) <= rest else after[: max(0, rest)] + "…")

    def _repr_html_(self) -> str:
        return shaded(self, self.activation)


def shaded(context: Context, peak: float) -> str:
    """The context as HTML: a token is the darker the stronger the latent fires on it, `peak` being the darkest."""
    parts = []
    for n, token in enumerate(context.tokens):
        style, value = "", context.activations[n]
        if np.isfinite(value) and peak > 0:
            style = f"background:rgba({_SHADE},{0.75 * min(1.0, max(0.0, value / peak)):.2f});border-radius:2px;"
        if n == context.anchor:
            style += "outline:1px solid currentColor;"
        title = f' title="{value:.4g}"' if np.isfinite(value) else ""
        parts.append(f'<span style="{style}"{title}>{safe(token)}</span>' if style else safe(token))
    return f'<span style="font-family:monospace;white-space:pre-wrap">{"".join(parts)}</span>'


def read_contexts(samples: SampleTable, rows: NDArray[np.int64]) -> list[Context]:
    """The contexts of one latent's rows, in their order."""
    kept = {
        (int(samples.sequence[r]), int(samples.position[r])): float(samples.activation[r])
        for r in rows[::-1]
        if samples.sequence[r] >= 0
    }
    found = []
    for r, context in zip(rows, samples.contexts(rows), strict=True):
        anchor, position, sequence = int(samples.anchor[r]), int(samples.position[r]), int(samples.sequence[r])
        if not 0 <= anchor < len(context):
            continue
        begin = 0
        while begin < anchor and context[begin] == "":
            begin += 1
        tokens, anchor = context[begin:], anchor - begin
        nothing = float("nan")
        strengths = [kept.get((sequence, position - anchor + n), nothing) for n in range(len(tokens))]
        strengths[anchor] = float(samples.activation[r])
        found.append(
            Context(
                kind="top" if samples.top[r] else "stratified",
                tokens=tokens,
                anchor=anchor,
                activation=float(samples.activation[r]),
                activations=np.asarray(strengths),
                position=position,
                sequence=sequence,
                step=int(samples.step[r]),
            )
        )
    return found
