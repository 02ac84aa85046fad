# The commands: make demo, test, test-fast, stress, versions, lint, docs, tables, wheel, zoo, clean. PYTHON names an interpreter of 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
ZOO := build/zoo
# Of make versions: the newest torch that pyproject.toml admits.
TORCH ?= 2.15.0
OTHER = build/torch-$(TORCH)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PIN := -c constraints.txt
# Processes of pytest-xdist, each with one thread of its own; 0: one process with all threads.
JOBS ?= 2
PYTEST_ARGS ?=

PYTEST = NVTE_PROJECT_BUILDING=1 $(if $(filter-out 0,$(JOBS)),OMP_NUM_THREADS=1) $(BIN)/python -m pytest -n $(JOBS) \
  $(if $(filter-out 0,$(JOBS)),--dist worksteal)
# For daily work: no training runs, ranks, exports, other frameworks or kernels in the interpreter.
FAST := $(wildcard tests/test_*.py) $(addprefix tests/,backend context fusion layer nn ops recipe report tensor)

.PHONY: demo test test-fast stress versions lint docs tables wheel zoo clean

# Full precision and NVFP4 one after the other on a generated set of shapes: pictures, curves and a table in runs/demo.
demo: $(VENV)/.train
	$(BIN)/python examples/unet_coco/train.py --compute auto --out runs/demo

test: $(VENV)/.dev
	$(PYTEST) $(PYTEST_ARGS)

test-fast: $(VENV)/.dev
	$(PYTEST) -m "not slow and not gpu" $(FAST) --ignore=tests/ops/kernels $(PYTEST_ARGS)

# Long randomized programs and whole sets of cases, of which make test runs a part. Takes as long as it takes.
stress: $(VENV)/.dev
	$(PYTEST) -m stress $(PYTEST_ARGS)

# The tests with another torch than constraints.txt has, in an environment of its own of several GB: make versions TORCH=2.11.0
versions: $(OTHER)/.made
	OMP_NUM_THREADS=1 $(OTHER)/bin/python -m pytest -n $(JOBS) --dist worksteal -m "not gpu and not stress" $(PYTEST_ARGS)

docs: $(VENV)/.dev
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "docs: build/docs/index.html"

# The tables of README.md and docs/RESULTS.md, from the raw rows in docs/accuracy and docs/results.
tables: $(VENV)/.dev
	$(BIN)/python examples/tables.py

# With the CPU kernels compiled for all x86-64 processors, for users who have no compiler: dist/te_nvfp4_cv-*.whl.
wheel: $(VENV)/bin/python
	rm -rf build/lib* build/bdist.* dist/*.whl
	TE_NVFP4_CV_WHEEL=1 PIP_CONSTRAINT=constraints.txt $(PIP) wheel --no-deps -w dist .

# Models and training loops of other libraries, in an environment of their own, with the same torch; the models go on
# where they stopped.
zoo: $(ZOO)/.made
	OMP_NUM_THREADS=1 $(ZOO)/bin/python -m pytest -q tests/examples/test_frameworks.py tests/integrations/test_adapters_transformers.py \
	  tests/distributed/test_spatial_monai.py
	$(ZOO)/bin/python examples/zoo/run.py
	$(ZOO)/bin/python examples/zoo/page.py

lint: $(VENV)/.dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis runs/demo
	find te_nvfp4_cv tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); needed: Python 3.11 or newer; say make $(or $(MAKECMDGOALS),test) PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# pip leaves one core idle, so the CPU kernels are compiled meanwhile. Python compiles what is imported, and --no-compile
# leaves it the rest of the packages, most of which is never imported.
$(VENV)/.train: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PYTHON) te_nvfp4_cv/backend/compilation.py & \
	$(PIP) install --quiet --no-compile $(PIN) -e ".[train]"; code=$$?; wait; exit $$code
	touch $@

$(ZOO)/.made: pyproject.toml constraints.txt examples/zoo/requirements.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m venv $(ZOO)
	$(ZOO)/bin/python -m pip --disable-pip-version-check install --quiet $(PIN) -r examples/zoo/requirements.txt -e ".[export]"
	$(ZOO)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps ultralytics==8.4.190
	touch $@

# torchvision and triton as that torch wants them, and the rest as ever.
$(OTHER)/.made: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OTHER)
	grep -Ev '^(torch|torchvision|triton|setuptools)==' constraints.txt > $(OTHER)/constraints.txt
	$(OTHER)/bin/python -m pip --disable-pip-version-check install --quiet torch==$(TORCH) torchvision
	$(OTHER)/bin/python -m pip --disable-pip-version-check install --quiet -c $(OTHER)/constraints.txt \
	  -e ".[train,dev,adapters,telemetry,export]"
	touch $@

# TransformerEngine without its dependencies: the pure-Python wheel has the recipes, which the tests compare with ours.
$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install --quiet $(PIN) -e ".[train,dev,adapters,telemetry,export,docs]"
	$(PIP) install --quiet $(PIN) --no-deps transformer-engine==2.20.2
	@test ! -f $(VENV)/.train || $(BIN)/python -m compileall -q -j $(or $(JOBS),1) $(VENV)/lib >/dev/null || true
	touch $@
