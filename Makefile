# Everything runs in .venv, made on first use; only Python 3.11 or newer, make and pip are needed.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test test-all conformance mutations fuzz lint bench rows peers clean

demo: .venv/run.done
	$(BIN)/kvsim run -o demo-run

test: .venv/test.done
	$(PYTEST) -m "not heavy and not gpu" -n 2

test-all: .venv/test-all.done
	$(PYTEST) -m "not gpu" -n 2

# Random cases on the real scheduler and on kvsim, for MINUTES (default 1); docs/conformance.md. The first run makes
# the real scheduler's environment (2.5 GB) in .oracle-venv, or in ORACLE_VENV.
conformance: .venv/test.done
	$(BIN)/python -m tests.conformance $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED)) $(ARGS)

# Wrong rules, one at a time, each of which a test must catch; docs/conformance.md.
mutations: .venv/test.done
	$(BIN)/python -m tests.conformance.mutations $(ARGS)

# Ten minutes for each of the 32 sample files of tests/trace/samples.py; for nightly runs.
fuzz: .venv/test.done
	KVSIM_FUZZ_SECONDS=$${KVSIM_FUZZ_SECONDS:-600} KVSIM_FUZZ_SEED=$${KVSIM_FUZZ_SEED:-$$(date +%s)} \
	  $(PYTEST) -m heavy tests/trace/test_trace_fuzz.py -n 2

lint: .venv/test-all.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Every benchmark once, small sizes only; benchmarks/README.md says how to measure.
bench: .venv/test-all.done
	cd benchmarks && ../$(BIN)/asv machine --yes && \
	  KVSIM_BENCH_QUICK=1 ../$(BIN)/asv run --quick --python=same --show-stderr

# Every row of the speed table: ARGS="--rows A,B --json FILE"; benchmarks/README.md.
rows: .venv/test.done
	$(BIN)/python benchmarks/rows.py $(ARGS)

# The real scheduler and AISimulate on the same requests. The first run makes their environments (2.5 and 0.9 GB) in
# .oracle-venv and .peers-venv, or in ORACLE_VENV and PEERS_VENV.
peers: .venv/test.done
	$(BIN)/python benchmarks/peers/compare.py $(ARGS)

# One stamp for each set of installs; a changed pyproject.toml makes them again.
.venv/python.done:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "kvsim needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	touch $@

.venv/run.done: .venv/python.done pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/test.done: .venv/run.done
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,plot]'
	touch $@

.venv/test-all.done: .venv/test.done
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,plot,lint,bench,ray,nvrtc]' build
	touch $@

clean:
	rm -rf .venv .oracle-venv .peers-venv conformance-found demo-run build dist *.egg-info
