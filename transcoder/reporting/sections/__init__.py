"""The parts of report.html: each takes a Run and returns blocks."""
