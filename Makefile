SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help setup quickstart test check monitor bench clean

help: ## this list
	@echo "usage: make TARGET"
	@sed -nE 's/^([a-z]+):.*## (.*)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r target text; do \
		printf '  %-12s%s\n' "$$target" "$$text"; done

setup: $(STAMP) ## make .venv and install the pinned packages

$(STAMP): pyproject.toml constraints.txt
	@python="$$(deploy/system.sh setup)"; \
	if ! $(BIN)/python -c "import pip" 2>/dev/null; then \
		echo "setup: making .venv with $$python ($$("$$python" --version))"; \
		"$$python" -m venv --clear .venv; \
	fi
	@echo "setup: installing the packages of pyproject.toml at the versions of constraints.txt (some minutes at first)"
	@$(BIN)/python -m pip install --disable-pip-version-check --no-input -c constraints.txt -e '.[dev]' \
		| { grep --line-buffered -v '^Requirement already satisfied' || true; }
	@touch $@
	@echo "setup: done"

quickstart: setup ## the whole road on real data; KEEP=1 leaves the service up
	@$(BIN)/elasticrec quickstart $(if $(KEEP),--keep)

test: check ## everything .ci/run runs: check (with tests/arch), then the rest of the test suite
	@deploy/system.sh test
	$(BIN)/python -m pytest --durations=40 --durations-min=4 tests/cluster tests/contract tests/e2e tests/golden tests/unit

check: setup ## format, lint, types, import contracts, docs links, the docs as a site
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/arch
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # with --quiet it would not count warnings

monitor: setup ## Prometheus and Grafana beside a running cluster; ARGS="--dashboard URL" for another one
	@$(BIN)/elasticrec monitor $(ARGS)

bench: setup ## one benchmark: make bench THEME=name [ARGS="--quick"]
	@test -n "$(THEME)" || { echo "bench: name a theme: make bench THEME=name; there are:" \
		$$(cd benchmarks && ls *.py 2>/dev/null | sed 's/\.py$$//' | grep -v '^__') >&2; exit 2; }
	$(BIN)/python -m benchmarks.$(THEME) $(ARGS)

clean: ## remove caches and build outputs (keeps .venv and runs/)
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis platform/*.egg-info
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
