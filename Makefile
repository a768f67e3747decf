# Everything runs in .venv, made from requirements.lock by the first target that needs it.
SHELL := bash
.DEFAULT_GOAL := help

# The Python that .venv is made with: python3.11, or python3 where that is 3.11.
PYTHON ?= $(shell for python in python3.11 python3; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo "$$python" && break; done)
PY := .venv/bin/python
STAMP := .venv/.installed

# Idle OpenMP threads must sleep: two cores are shared by Ray's workers and the tests.
test test-long test-scenarios test-harness demo: export OMP_NUM_THREADS ?= 1
test test-long test-scenarios test-harness demo: export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help
help: ## list the targets
	@grep -E '^[a-z.]+:.*## ' Makefile | sed -E 's/^([a-z.]+):.*## /  make \1\t/' | expand -t 18

.venv: $(STAMP) ## the environment: pinned packages and this project, editable

$(STAMP): requirements.lock pyproject.toml
	@if [ -z "$(PYTHON)" ]; then echo "Python 3.11 not found; say where it is: make PYTHON=/path/to/python3.11" >&2; exit 1; fi
	[ -x $(PY) ] || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# Each worker takes a file at a time.
TEST_WORKERS ?= 2
PYTEST := $(PY) -m pytest -n $(TEST_WORKERS)

.PHONY: test
test: $(STAMP) ## run the tests, all but the long ones; TEST_WORKERS=n takes n processes
	$(PYTEST) --dist loadfile --no-loadscope-reorder -m "not long and not scenario" $(PYTEST_ARGS)

.PHONY: test-scenarios
test-scenarios: $(STAMP) ## run those that take minutes each: jobs through losses, submitted, over two hosts, measured
	$(PYTEST) --dist loadfile --no-loadscope-reorder -m scenario $(PYTEST_ARGS)

.PHONY: test-long
test-long: $(STAMP) ## run the long tests: every kind learns and compiles, jobs are killed and go on, servers under load
	$(PYTEST) --dist loadfile --no-loadscope-reorder -m long $(PYTEST_ARGS)

# Apart from .venv: it brings scikit-learn, which transformers imports wherever it is, and so would slow every process.
HARNESS := .venv/harness

$(HARNESS)/.installed: requirements-harness.lock $(STAMP)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(HARNESS) -r requirements-harness.lock
	@touch $@

.PHONY: test-harness
test-harness: $(HARNESS)/.installed ## run the tests that need lm-evaluation-harness, which this installs
	PYTHONPATH=$(HARNESS) $(PY) -m pytest tests/pipelines/test_harness.py $(PYTEST_ARGS)

.PHONY: check
check: $(STAMP) ## lint, formatting, types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.PHONY: demo
demo: $(STAMP) ## prepare, train, evaluate and summarise on the embedded books
	$(PY) pipelines/demo.py

# Resolves what pyproject.toml allows, installing nothing, and writes every version down. torch is held at one version,
# written without its build label and without the CUDA libraries (it pins those itself): one file for CPU and GPU machines.
TORCH ?= 2.13.0

.PHONY: lock
lock: ## write both locks anew; TORCH=x.y.z moves torch
	@[ -n "$(PYTHON)" ] && { [ -x $(PY) ] || $(PYTHON) -m venv .venv; }
	$(PY) -m pip install --quiet --disable-pip-version-check --dry-run --ignore-installed \
		--report .venv/resolved.json '.[train,serve,tracking,rouge,s3fs,dev]' 'torch==$(TORCH)'
	$(PY) -c "$$WRITE_LOCK" "Every version pinned, for Python 3.11 on Linux." /dev/null > requirements.lock.new
	$(PY) -m pip install --quiet --disable-pip-version-check --dry-run --ignore-installed \
		--report .venv/resolved.json -r requirements.lock.new '.[harness]'
	$(PY) -c "$$WRITE_LOCK" "What lm-evaluation-harness needs besides requirements.lock." requirements.lock.new \
		> requirements-harness.lock.new
	mv requirements.lock.new requirements.lock
	mv requirements-harness.lock.new requirements-harness.lock

define WRITE_LOCK
import json, sys
headline, without = sys.argv[1:]
known = {line.split("==")[0] for line in open(without)}
items = [item["metadata"] for item in json.load(open(".venv/resolved.json"))["install"]]
pins = {item["name"].lower().replace("_", "-"): item["version"].split("+")[0] for item in items}
print(f"# {headline} Written by `make lock`; change pyproject.toml, not this file.")
for name in sorted(pins.keys() - known - {"rmt-ray"}):
    if not name.startswith(("nvidia-", "cuda-", "triton")):
        print(f"{name}=={pins[name]}")
endef
lock: export WRITE_LOCK := $(WRITE_LOCK)

.PHONY: clean
clean: ## remove .venv, caches and builds; leave runs/ alone
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
