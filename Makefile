# make install: .venv, which each other target makes first from the pinned dependencies. make repro: text -> registered
# model. make app: its web page. make test, make check, make faults: unit, integration and fault tests.
ifeq ($(OS),Windows_NT)
$(error this program runs on Linux and macOS: on Windows, run it in WSL 2)
endif
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# One process for each core, at most four, each with whole files in the order of tests/conftest.py. OpenMP threads sleep
# while they wait.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile \
	--no-loadscope-reorder
IN_GIT := git ls-files --error-unmatch dvc.yaml >/dev/null 2>&1
# Where git does not track the folder, DVC must be told to work without git.
NO_SCM := $(IN_GIT) || grep -qs no_scm .dvc/config.local || { mkdir -p .dvc && $(BIN)/dvc config --local core.no_scm true; }

.PHONY: install repro app showcase sweep dashboard test check faults lowest lint format clean-venv

install: $(INSTALLED)
	@$(NO_SCM)

repro: $(INSTALLED)
	@$(NO_SCM)
	$(BIN)/python -m pipeline repro

app: $(INSTALLED)
	$(BIN)/python app.py

sweep: $(INSTALLED)
	@$(NO_SCM)
	PATH="$(CURDIR)/$(BIN):$$PATH" python -m pipeline sweep

# For maintainers, after `make repro` with the committed params.yaml: README shows these reports.
showcase:
	git diff --exit-code HEAD -- params.yaml
	rm -rf docs/showcase
	cp -R reports docs/showcase
	rm docs/showcase/registered.json
	cp params.yaml docs/showcase/

dashboard: $(INSTALLED)
	$(BIN)/python -m pipeline sweep dashboard

test: $(INSTALLED)
	$(PYTEST) tests/unit

check: $(INSTALLED)
	$(PYTEST) tests/integration

faults: $(INSTALLED)
	$(PYTEST) tests/faults

# test and check, with the lowest version of each range in pyproject.toml. It needs uv: python -m pip install uv
lowest:
	uv venv --clear --seed --python 3.11 .venv-lowest
	uv pip install --python .venv-lowest --resolution lowest-direct --editable '.[dev]'
	touch .venv-lowest/installed
	$(MAKE) test check VENV=.venv-lowest

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: docs
docs: $(INSTALLED); NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict # without an announcement of the theme

clean-venv:
	rm -rf .venv .venv-lowest

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: $(PYTHON) is %d.%d: Python 3.11 or newer is needed, name one with PYTHON=" % sys.version_info[:2])'
	@$(IN_GIT) || echo 'git does not track this folder: DVC will work without git, and runs record no commit'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null || true # on all cores; packages have files for other Pythons
	@$(NO_SCM)
	touch $@
