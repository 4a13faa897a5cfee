# Everything happens in .venv; nothing outside this folder is touched.
PYTHON ?= $(shell command -v python3.11 || echo python3)
BIN := .venv/bin
# Where torch comes from. Empty: the package index. On Linux its wheel brings CUDA (3 GB), unless pip finds a CPU build.
# The small CPU build:  make install TORCH_INDEX=https://download.pytorch.org/whl/cpu
# A GPU build:          make install TORCH_INDEX=https://download.pytorch.org/whl/cu130
TORCH_INDEX ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Some environments forbid it. Then each of the processes that tests start would compile all of the code.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help install run demo test test-fast test-random coverage mutants mutants-report bench chaos docs lint format proto ui clean

help: ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{sub(/:.*/, "", $$1); printf "  make %-15s %s\n", $$1, $$2}'

install: .venv/installed-pipeline ## the environment that `make run` needs

.venv/bin/python:
	@command -v "$(PYTHON)" >/dev/null || { echo "resplit needs Python 3.11 or 3.12; name yours: make PYTHON=python3 ..."; exit 1; }
	"$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip

.venv/torch: .venv/bin/python
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip # `uv venv` makes one without pip
	@echo "installing torch"
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	@touch $@

.venv/installed-%: pyproject.toml .venv/torch
	@echo "installing resplit[$*] (some minutes, once)"
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@$(BIN)/python -c 'from resplit import planner; planner.load()' # compiles the kernels now, not in the first plan
	@touch $@

run: .venv/installed-pipeline ## the main job: a cluster on this machine, static against adaptive, a report
	$(BIN)/python -m flows.study

demo: .venv/installed-pipeline ## a cluster on this machine, a load, and the live page that shows it moving; Ctrl-C stops all
	$(BIN)/python -m flows.demo

test: .venv/installed-test ## all tests, two at a time
	$(BIN)/python -m pytest -m "not processes" --numprocesses 2
	$(BIN)/python -m pytest -m processes --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-fast: .venv/installed-test ## the tests that start no processes, with a tenth of the random examples
	RESPLIT_QUICK_TESTS=1 $(BIN)/python -m pytest -m "not processes" --numprocesses 2

test-random: .venv/installed-test ## the tests that start no processes, with random examples that no run has tried before
	RESPLIT_RANDOM_TESTS=1 $(BIN)/python -m pytest -m "not processes" --numprocesses 2

coverage: .venv/installed-test ## all tests, with the share of lines and branches that they run, processes included
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered

mutants: .venv/installed-dev ## change the code at random and count which changes the tests notice; hours, resumes
	$(BIN)/mutmut run
	$(BIN)/python -m scripts.mutants

mutants-report: .venv/installed-dev ## the share of mutants killed so far, by package, and the survivors
	$(BIN)/python -m scripts.mutants

bench: .venv/installed-test ## benchmarks of serving and of the planner: ratios, in one run; writes reports/bench.json
	$(BIN)/python -m benchmarks.serving
	$(BIN)/python -m benchmarks.planner

chaos: .venv/installed-test ## break clusters on purpose, more than an hour; writes reports/chaos.md
	$(BIN)/python -m benchmarks.chaos

docs: .venv/installed-docs ## the documents as a site in site/, with every link checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

lint: .venv/installed-dev ## format, lint, types, import rules, dead code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/vulture

format: .venv/installed-dev ## format, and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: .venv/installed-dev ## regenerate the wire's messages
	cd src && ../$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. \
	  --plugin=protoc-gen-grpclib_python=../$(BIN)/protoc-gen-grpclib_python --grpclib_python_out=. resplit/wire/node.proto

ui: .venv/installed-pipeline ## the MLflow page of all studies, http://127.0.0.1:5000
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true $(BIN)/mlflow server --workers 1 --no-serve-artifacts \
	  --backend-store-uri "sqlite:///$(CURDIR)/.resplit/mlflow/mlflow.db" --default-artifact-root "file://$(CURDIR)/.resplit/mlflow/artifacts"

clean: ## delete state, generated data and reports; keep the environment
	rm -rf .resplit data/generated mutants site .coverage* reports/index.html reports/metrics.json reports/plots reports/chaos*
