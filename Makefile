.PHONY: check test test-slow bench measure demo docs sanitize

check:  ## linters and type checker
	ruff check
	ruff format --check
	.ci/typecheck

test:
	pytest

test-slow:  ## the long tests, which pytest leaves out by default
	pytest -m slow

bench:
	pytest bench/ --benchmark-only

measure:  ## everything for this machine, on a quiet one: bench/results/<device>.json and docs/performance.md
	python -m bench.measure

docs:  ## the documentation site into build/site; needs pip install -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

demo:
	transcoder demo

# The op tests with the C++ extension built for AddressSanitizer and UndefinedBehaviourSanitizer (its own entry in the
# cache; about 2 minutes of one core). Python is not instrumented, so the runtime is loaded first; leaks are Python's own.
SANITIZED = tests/kernels/test_cpp_backend.py tests/kernels/test_decode.py tests/kernels/test_encode.py \
	tests/kernels/test_screened_encode.py tests/kernels/test_screened_batch.py tests/kernels/test_cpp_sketch.py \
	tests/kernels/test_nearest.py tests/kernels/test_counts.py tests/kernels/test_cpp_adam.py \
	tests/kernels/test_correlation.py tests/antidup/test_samples.py tests/training/test_optimizer.py
sanitize: export CXX = g++ -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all \
	-fno-omit-frame-pointer -g
sanitize: export ASAN_OPTIONS = detect_leaks=0
sanitize: preload = $(shell g++ -print-file-name=libasan.so) $(shell g++ -print-file-name=libstdc++.so)
sanitize:
	LD_PRELOAD="$(preload)" python -c \
		"from transcoder.kernels import extension as e; r = e.available_reason(); assert r is None, r"
	LD_PRELOAD="$(preload)" pytest -q -p no:cacheprovider --capture=sys $(SANITIZED)
