"""Small tables of a run as pandas data frames, properties of `Run`: prefixes and positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from transcoder.reporting.format import real, whole

if TYPE_CHECKING:
    import pandas as pd

    from transcoder.reporting.run import Run

BINS = 10


def prefixes(run: Run) -> pd.DataFrame:
    """What each Matryoshka width explains, by width, the narrowest first.

    Columns: `added`, latents more than the prefix before; `fvu`; `explained`, 1 - fvu; `gain`, the FVU less than the prefix
    before, NaN for the first. `attrs["heldout"]` is False where only training batches were measured.

    Raises:
        RunPartMissingError: no FVU by prefix was logged.
    """
    import pandas as pd

    heldout = run.prefix_metrics("evaluation/fvu_prefix")
    found = heldout or run.prefix_metrics("metrics/fvu_prefix")
    if not found:
        raise run.missing_error("metrics by prefix", "metrics.jsonl")
    fvu = pd.Series(found, name="fvu").rename_axis("width")
    added = fvu.index.to_series().diff().fillna(fvu.index[0]).astype(int)
    table = pd.DataFrame({"added": added, "fvu": fvu, "explained": 1 - fvu, "gain": -fvu.diff()})
    table.attrs["heldout"] = bool(heldout)
    return table


def positions(run: Run) -> pd.DataFrame:
    """How many of the kept samples stand in each of ten equal parts of the sequence.

    Index: `first` and `last` position of the part. Columns: `strongest` samples, only these show a preference; `stratified`,
    the samples drawn evenly over positions. `attrs["edges"]`: [11] where the parts begin and end; `attrs["sink_share"]`: share
    of the evenly drawn samples at special tokens, None where it was not recorded.

    Raises:
        RunPartMissingError: there are no samples.
    """
    import pandas as pd

    samples = run.samples
    if samples is None:
        raise run.missing_error("positions", "activation samples")
    length = max(whole(run.setting("activations.sequence_length")) or 0, int(samples.position.max()) + 1)
    edges = np.linspace(0, length, BINS + 1)
    first = np.ceil(edges).astype(int)
    table = pd.DataFrame(
        {
            "strongest": np.histogram(samples.position[samples.top], edges)[0],
            "stratified": np.histogram(samples.position[~samples.top], edges)[0],
        },
        index=pd.MultiIndex.from_arrays([first[:-1], first[1:] - 1], names=["first", "last"]),
    )
    table.attrs = {"edges": edges, "sink_share": real(run.sample_summary.get("sink_fraction"))}
    return table
