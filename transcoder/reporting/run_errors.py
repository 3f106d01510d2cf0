"""What is raised where a run lacks a part that was asked for."""

from __future__ import annotations

from transcoder.reporting.runfolder import RunFolder


class RunPartMissingError(LookupError):
    """A part of a run is not there. The message names the part, the folder and the reason."""


def missing_part(folder: RunFolder, what: str, *listed: str) -> RunPartMissingError:
    """The error for `what`; the reason is that of the first of `listed` which the folder's own list of missing things has."""
    reasons = {m.what: m.why for m in folder.missing}
    why = next((reasons[name] for name in listed if name in reasons), "it is not in the folder")
    return RunPartMissingError(f"run {str(folder.path)!r} has no {what}: {why}")
