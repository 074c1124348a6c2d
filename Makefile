# `make help` lists the targets. Settings: PRESET, PYTHON, ENCODE_HOME, TORCH_INDEX (where pip finds CPU wheels of torch),
# TEST_PROCESSES (each with servers of its own).
PYTHON ?= python3.11
PRESET ?= complete-journey
TORCH_INDEX ?=
TEST_PROCESSES ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install run test check audit bench-cluster bench-refresh bench-train bench-quality bench-serve bench-swaps bench-hammer down clean status

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

install: $(STAMP) ## make .venv and install the pinned requirements

$(STAMP): requirements.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11, or set PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned requirements into $(VENV), 2 to 4 minutes"
	@test -z "$(TORCH_INDEX)" || $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --index-url "$(TORCH_INDEX)" "$$(grep '^torch==' requirements.txt)"
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -r requirements.txt 2>$(VENV)/pip.err \
	  | awk '/^Collecting/ && ++n % 25 == 0 { print "  " n " packages found"; fflush() } \
	         /^Installing/ { print "  unpacking " n " packages"; fflush() }' \
	  || { cat $(VENV)/pip.err; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(STAMP)
	@echo "installed; \`make run\` starts everything on a real log, \`make help\` lists the rest"

run: $(STAMP) ## start the local stack and run everything through Airflow on a real log
	@exec $(BIN)/encode quickstart --preset $(PRESET)

$(VENV)/installed-%: requirements-%.txt $(STAMP)
	@echo "installing $< into $(VENV), up to a minute"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r $< 2>$(VENV)/pip.err \
	  || { cat $(VENV)/pip.err; exit 1; }
	@touch $@

$(VENV)/installed-fuxictr: requirements-fuxictr.txt $(STAMP)
	@echo "installing $< into $(VENV), a second"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r $< 2>$(VENV)/pip.err \
	  || { cat $(VENV)/pip.err; exit 1; }
	@touch $@

test: $(VENV)/installed-spark $(VENV)/installed-bench $(VENV)/installed-fuxictr ## run the whole suite, with real servers
	@exec $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

check: $(STAMP) ## format, lint and type check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

audit: $(STAMP) ## known vulnerabilities of the pinned requirements (asks osv.dev), and whether they fit together
	@broken=$$($(BIN)/python -m pip check | grep -E ' requires | has requirement ' | grep -v '^fuxictr '); \
	  test -z "$$broken" || { echo "$$broken"; exit 1; }
	@test -x $(VENV)/audit/bin/pip-audit || { $(PYTHON) -m venv $(VENV)/audit \
	  && $(VENV)/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1; }
	@$(VENV)/audit/bin/pip-audit --strict --vulnerability-service osv --no-deps --disable-pip --progress-spinner off \
	  -r requirements.txt 2>$(VENV)/audit/err || { tail -1 $(VENV)/audit/err; \
	  echo "audit: failed: a vulnerability above, or osv.dev was not reached, and then nothing is known"; exit 1; }

status: ## show the state of the local stack
	@$(BIN)/encode stack status || true

bench-cluster: $(VENV)/installed-bench ## behaviors clustered a second, against scikit-learn, faiss and a limit in C
	@$(BIN)/python -m benchmarks.cluster

bench-refresh: $(VENV)/installed-bench ## refresh of 10 to 100 M behaviors, against sorting them (16 GB of disk, 7 minutes)
	@$(BIN)/python -m benchmarks.refresh

bench-train: $(VENV)/installed-fuxictr ## impressions trained a second, against DIN and SIM of FuxiCTR (4 minutes)
	@$(BIN)/python -m benchmarks.train

bench-serve: $(STAMP) ## latency of 1,000 candidates, in the process and over HTTP, against MLflow, SIM, ETA, SDIM (10 minutes)
	@$(BIN)/python -m benchmarks.serve

bench-swaps: $(STAMP) ## 200 releases while requests are answered: how many fail, how many mix two bundles (2 minutes)
	@$(BIN)/python -m benchmarks.swaps

bench-hammer: $(VENV)/installed-bench ## 100,000 bad requests, slow clients, kill -9: what breaks serving (10 minutes)
	@$(BIN)/python -m benchmarks.hammer

bench-quality: $(STAMP) ## every model of long-term interest on three tasks, five seeds (hours; goes on where it was)
	@$(BIN)/python -m benchmarks.quality

down: ## stop the local stack; data stay
	@test ! -x $(BIN)/encode || $(BIN)/encode stack down

clean: ## stop the local stack and remove its data
	@test ! -x $(BIN)/encode || $(BIN)/encode stack clean
