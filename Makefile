PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: run test bench docs clean

run: $(STAMP)            ## trains the same network once per pooling and says which is better
	$(BIN)/torchpool study

test: $(STAMP)           ## every check
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mkdocs build --quiet
	$(BIN)/python -m pytest tests/test_structure.py
	$(BIN)/python -m pytest -n 2 --dist worksteal --doctest-modules src tests --ignore tests/test_structure.py

bench: $(STAMP)          ## side by side with other libraries
	$(BIN)/python benchmarks/quick.py

docs: $(STAMP)           ## the site, in build/site
	$(BIN)/mkdocs build --quiet

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch" numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
