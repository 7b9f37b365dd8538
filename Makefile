# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Of pytest: one more than two cores, since many tests wait for processes.
WORKERS ?= 3

.PHONY: demo test test-all test-oldest lint bench clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# The Azure emulator comes from npm; where there is none, its tests say so and are skipped.
$(VENV)/.azurite: $(STAMP) scripts/install-azurite.sh
	scripts/install-azurite.sh $(VENV)
	touch $@

# Slurm comes from Debian's archive, and needs root; where it cannot be had, its tests say so and are skipped.
$(VENV)/.slurm: $(STAMP) scripts/install-slurm.sh
	scripts/install-slurm.sh
	touch $@

# Nodes that are cut off from each other are network namespaces; where `ip` cannot be had, those tests are skipped.
$(VENV)/.iproute2: $(STAMP) scripts/install-iproute2.sh
	scripts/install-iproute2.sh
	touch $@

# What the demo needs, which is much less than what the tests do.
$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	touch $@

demo: $(VENV)/.demo  ## train, kill three times, prove that the result is the same
	$(BIN)/python examples/chargpt/demo.py

test: $(STAMP) $(VENV)/.azurite  ## everything that finishes within ten minutes on two cores
	$(BIN)/pytest -n $(WORKERS) -m "not long"

test-all: $(STAMP) $(VENV)/.azurite $(VENV)/.slurm $(VENV)/.iproute2  ## the long attacks as well
	HOLDFAST_TEST_SCALE=long $(BIN)/pytest -n $(WORKERS)

test-oldest: $(STAMP)  ## the adapters with the oldest frameworks that they are made for
	scripts/test-oldest-frameworks.sh $(VENV)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench:  ## holdfast beside its peers, which live in an environment of their own
	benchmarks/setup.sh
	.venv-bench/bin/python benchmarks/checkpoint.py

clean:
	rm -rf $(VENV) demo-out
