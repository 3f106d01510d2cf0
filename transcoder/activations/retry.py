"""A source that breaks in the middle is opened again at the place that was reached, a few times, with pauses."""

from __future__ import annotations

import logging
import time
from typing import Any

from transcoder.activations.documents import DataError, Record, Records, Source

logger = logging.getLogger(__name__)

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds before each further try: a minute of no network, or of a file server that restarts, costs no run."""


class PatientSource:
    """As `source`; what fails for a reason of the network or of a disk is tried again from the record that was due.

    Every record still comes exactly once and in order. A `DataError` (the data themselves are wrong) is raised at once.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    def open(self, state: dict[str, Any] | None) -> Records:
        return _PatientRecords(self._source, state)

    def digest(self) -> str | None:
        return self._source.digest()


class _PatientRecords:
    def __init__(self, source: Source, state: dict[str, Any] | None) -> None:
        self._source = source
        self._records = source.open(state)

    def __iter__(self) -> _PatientRecords:
        return self

    def state(self) -> dict[str, Any]:
        return self._records.state()

    def __next__(self) -> Record:
        # The reader asks for the state at each record anyhow.
        due = self._records.state()
        try:
            return next(self._records)
        except (StopIteration, DataError):
            raise
        except Exception as error:  # dozens of types: each of the libraries below has its own
            last: Exception = error
        for number, pause in enumerate(PAUSES, start=1):
            logger.warning(
                "the data broke off (%s: %s); try %d of %d in %g s",
                type(last).__name__,
                last,
                number,
                len(PAUSES),
                pause,
            )
            time.sleep(pause)
            try:
                self._records = self._source.open(due)
                return next(self._records)
            except StopIteration:
                raise
            except Exception as error:
                last = error
        raise DataError(
            f"activations.dataset: the data broke off and did not come back in {len(PAUSES)} tries over {sum(PAUSES):g} s: "
            f"{type(last).__name__}: {last}. The state is saved; --resume goes on at this place"
        ) from last
