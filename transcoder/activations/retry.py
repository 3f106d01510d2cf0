"""A source that breaks in the middle is opened again at the place that was reached, a few times, with pauses."""

from __future__ import annotations

import logging
import time
from typing import Any

from transcoder.activations.documents import DataError, Record, Records, RecordSource

logger = logging.getLogger(__name__)

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds before each further try: a minute without a network, or without a file server that restarts, ends no run."""


class RetriedRecords:
    """The records of `source`; a failure of the network or of a disk is tried again from the record that was due.

    Every record still comes exactly once and in order. A `DataError` (the data themselves are wrong) is raised at once.
    """

    def __init__(self, source: RecordSource) -> None:
        self._source = source

    def digest(self) -> str | None:
        return self._source.digest()

    def read(self, state: dict[str, Any] | None) -> Records:
        return self._read(self._source.read(state), state)

    def _read(self, records: Records, state: dict[str, Any] | None) -> Records:
        while True:
            try:
                found = next(records, None)
            except DataError:
                raise
            except Exception as error:  # dozens of types: each library under a source has its own
                records, found = self._try_again(state, error)
            if found is None:
                return
            state = found[1]
            yield found

    def _try_again(
        self, state: dict[str, Any] | None, error: Exception
    ) -> tuple[Records, tuple[Record, dict[str, Any]] | None]:
        """The records from `state` on, and the first of them (None: there is no further one)."""
        for number, pause in enumerate(PAUSES, start=1):
            kind = type(error).__name__
            logger.warning("the data broke off (%s: %s); try %d of %d in %g s", kind, error, number, len(PAUSES), pause)
            time.sleep(pause)
            try:
                records = self._source.read(state)
                return records, next(records, None)
            except Exception as again:
                error = again
        raise DataError(
            f"activations.dataset: the data broke off and did not come back in {len(PAUSES)} tries over {sum(PAUSES):g} s: "
            f"{type(error).__name__}: {error}. The state is saved; --resume goes on at this place"
        ) from error
