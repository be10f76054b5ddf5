# `make quick` and `make test` need python3 and make, nothing else: they set up .venv themselves.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
OUT ?= runs/quick

.PHONY: quick test test-zoo lint clean

quick: $(VENV)/.installed
	$(BIN)/padprobe study configs/study/quick.yaml --out $(OUT)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not zoo"

# Tests with networks and hosts of other packages, which it installs.
test-zoo: $(VENV)/.installed-hosts
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/zoo tests/hosts tests/network/test_layout.py tests/network/test_embedding.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.installed: setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e ".[all]"
	touch $@

$(VENV)/.installed-dev: setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@ $(VENV)/.installed

$(VENV)/.installed-hosts: setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e ".[dev,hosts]"
	touch $@ $(VENV)/.installed-dev $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist *.egg-info
