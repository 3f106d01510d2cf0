.PHONY: check test bench demo

check:  ## linters and type checker
	ruff check
	ruff format --check
	.ci/typecheck

test:
	pytest

bench:
	pytest bench/ --benchmark-only

demo:
	transcoder demo
