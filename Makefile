# `make` lists the targets. `make demo` and `make test` set everything up by themselves.
PYTHON ?= python3
DIR ?=
BENCH ?= runs/bench
BIN := .venv/bin

# Where it is set (many images set it) every process compiles anew all that it imports: 18 s for what a stage needs.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo check light test every processors lint types docker-check bench gpu-check clean .types

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' Makefile

setup: ## environment in .venv, with the build of vLLM that fits this machine
	@docker/setup.sh all $(PYTHON)

demo: ## make a teacher, distil it and report, on this machine, in minutes (DIR=folder)
	@docker/setup.sh demo $(PYTHON)
	$(BIN)/stillroom demo $(if $(DIR),--dir $(DIR))

# The rooms whose tests run no model.
LIGHT := test_docker.py test_layers.py pipeline/cli/test_main.py pipeline/run/test_status.py stages/ledger \
    stages/losses/test_divergences.py stages/recipe stages/workers storage/snapshots storage/tables storage/test_keys.py \
    storage/test_keyset.py

check: setup .types ## lint, types and the tests that run no model, beside one another
	@$(MAKE) --no-print-directory -j 3 lint types light

light: setup
	$(BIN)/pytest -q -m "not slow and not assets and not vllm" $(addprefix tests/,$(LIGHT))

test: setup .types ## lint, types and all tests, beside one another: mypy alone would leave a core with nothing to do
	@$(MAKE) --no-print-directory -j 3 lint types every

every: setup
	$(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal

# Each of the two cores has its own tests. A second thread of a test asks for half of a core: it must not spin for it.
# Only files that have one: each worker of each run would import all the others to find none there.
NUMERIC := OMP_WAIT_POLICY=passive $(BIN)/pytest -m "numeric and not slow" -n 2 --dist worksteal \
    $$(grep -rl "mark\.numeric" tests/stages --include="test_*.py")
PLAIN := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE

# `make test` has this processor's kernels on one thread. The plainest on one thread have no pass: what is too small to be
# shared between threads (nearly all of these tests) is computed there just as with two.
processors: setup ## the numeric tests as `make test` does not run them: on two threads, with this processor's kernels and the plainest
	STILLROOM_TEST_THREADS=2 $(NUMERIC)
	STILLROOM_TEST_THREADS=2 $(PLAIN) $(NUMERIC)

lint: setup ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup .types ## mypy
	$(BIN)/mypy .types/stillroom

# mypy does not follow the import hook of an editable install; it follows this tree of links.
.types:
	mkdir -p .types/stillroom
	for name in __init__.py __main__.py pipeline stages storage; do ln -sfn ../../$$name .types/stillroom/$$name; done

docker-check: ## lint the Dockerfile, build and try the CPU image, with Docker or buildah
	docker/check.sh

bench: setup ## speed: the loss, scoring, a training step, the loader, a whole run; about 20 minutes (BENCH=folder of the results)
	for name in loss score train_step loader pipeline; do $(BIN)/python tests/bench/$$name.py --out $(BENCH) || exit 1; done

# No set-up: a GPU machine without a network has its own Python. tests/bench/README.md says what to carry there.
gpu-check: ## kernel tests and all benches on an NVIDIA GPU, in under nine minutes (BENCH=folder of the results)
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tests/bench/gpu_check.py --out $(BENCH)

clean: ## remove what make made, except .venv, runs and stores
	rm -rf .types __pycache__ build dist *.egg-info docker/cpu/shims/*/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find pipeline stages storage tests -name __pycache__ -prune -exec rm -rf {} +
