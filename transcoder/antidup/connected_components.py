"""Connected components of a graph of duplicate pairs."""

from __future__ import annotations

from collections.abc import Iterable


def connected_components(pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Groups of latents joined by pairs: each sorted, the largest group first, ties by the smallest
    latent."""
    parent: dict[int, int] = {}

    def root(x: int) -> int:
        parent.setdefault(x, x)
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    for i, j in pairs:
        a, b = root(i), root(j)
        if a != b:
            parent[max(a, b)] = min(a, b)
    groups: dict[int, list[int]] = {}
    for x in sorted(parent):
        groups.setdefault(root(x), []).append(x)
    return sorted(groups.values(), key=lambda g: (-len(g), g[0]))
