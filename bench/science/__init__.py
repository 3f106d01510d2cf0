"""Ground truth as a benchmark: S0 to S4 of the anti-duplication science, each with its target. `python -m bench.science`."""
