PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Byte code is made beside the first checks, which leave a core idle; pip would make all wait.
COMPILE := $(BIN)/python -m compileall -qq $(VENV)/lib/python3*/site-packages

.PHONY: run test fuzz boundscheck bench docs clean

run: $(STAMP)            ## trains the same network once per pooling and says which is better
	$(BIN)/torchpool study

test: $(STAMP)           ## every check but the long ones: fuzz, boundscheck
	@($(COMPILE)/torch; $(COMPILE)) > /dev/null 2>&1 &
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mkdocs build --quiet
	$(BIN)/mypy & types=$$!; $(BIN)/python -m pytest tests/test_structure.py && wait $$types
	$(BIN)/python -m pytest -n 2 --dist worksteal --doctest-modules src tests \
	  --ignore tests/test_structure.py --ignore tests/test_fuzz.py

fuzz: $(STAMP)           ## 2,560 random calls against the oracle
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/test_fuzz.py

boundscheck: $(STAMP)    ## the CPU kernels with every access checked, in a cache of their own
	NUMBA_BOUNDSCHECK=1 NUMBA_CACHE_DIR=$(CURDIR)/.numba-boundscheck \
	  $(BIN)/python -m pytest -n 2 --dist worksteal --hypothesis-profile brief tests/test_cpu.py tests/test_fuzz.py

bench: $(STAMP)          ## side by side with other libraries: benchmarks/results/cpu.json
	$(PIP) -e ".[bench]"
	$(BIN)/torchpool bench

docs: $(STAMP)           ## the site, in build/site
	$(BIN)/mkdocs build --quiet

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --no-compile "torch" numpy
	$(PIP) --no-compile -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .numba-boundscheck .pytest_cache .mypy_cache .ruff_cache .hypothesis
