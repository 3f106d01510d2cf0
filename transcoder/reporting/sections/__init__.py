"""The parts of report.html: each takes a RunFolder and returns HTML."""
