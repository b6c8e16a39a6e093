# make install: .venv with the locked packages, which each other target makes first; EXTRAS="s3 postgres" adds extras.
# make repro: text -> registered model. make learn TEXT=diary.txt: the same for a text of one's own; OPTIONS="--time 10m"
# are options of `totarget learn`. make app: the web page. make test, check and faults: unit, integration, fault tests.
ifeq ($(OS),Windows_NT)
$(error this program runs on Linux and macOS: on Windows, run it in WSL 2)
endif
PYTHON ?= python3
TORCH ?= auto# build of torch on Linux: cpu or cuda; auto: cuda where an NVIDIA driver is installed
# Python compiles a package at its first import. Without its files, each command would compile all that it imports again.
unexport PYTHONDONTWRITEBYTECODE
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
DEV := $(VENV)/installed-dev
# One process for each core, at most four, each with whole files in the order of tests/conftest.py. OpenMP threads sleep
# while they wait.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile \
	--no-loadscope-reorder
# DVC works with git where git tracks the folder, otherwise without. git refuses a folder of another user, with a hint.
define SCM
@error=$$(LC_ALL=C git ls-files --error-unmatch dvc.yaml 2>&1 >/dev/null); case $$?$$error in \
0*) ! grep -qs no_scm .dvc/config.local || $(BIN)/dvc config --local --unset core.no_scm ;; \
*'dubious ownership'*) echo "$$error" >&2; exit 2 ;; \
*) grep -qs no_scm .dvc/config.local || { mkdir -p .dvc && $(BIN)/dvc config --local core.no_scm true && \
	echo 'git does not track this folder: DVC will work without git, and runs record no commit'; } ;; \
esac
endef

.PHONY: install repro learn no-text app showcase sweep dashboard test check faults check-faults lowest docs lint format lock clean-venv

UNKNOWN := $(filter-out dev docs postgres s3 team,$(EXTRAS))
ifneq ($(UNKNOWN),)
$(error EXTRAS has no $(UNKNOWN): choose from dev, docs, postgres, s3 and team)
endif

install: $(INSTALLED) $(EXTRAS:%=$(VENV)/installed-%)
	$(SCM)

repro: $(INSTALLED)
	$(SCM)
	$(BIN)/python -m pipeline repro

learn: $(if $(TEXT),$(INSTALLED),no-text)
	$(SCM)
	$(BIN)/python -m pipeline learn $(OPTIONS) '$(subst ','\'',$(TEXT))'

no-text:
	@echo 'error: name a text: make learn TEXT=diary.txt' >&2; exit 2

app: $(INSTALLED)
	$(BIN)/python app.py

sweep: $(INSTALLED)
	$(SCM)
	$(BIN)/python -m pipeline sweep

# For maintainers, after `make repro` with the committed params.yaml: README shows these reports.
showcase:
	git diff --exit-code HEAD -- params.yaml
	rm -rf docs/showcase
	cp -R reports docs/showcase
	rm docs/showcase/registered.json
	cp params.yaml docs/showcase/

dashboard: $(INSTALLED)
	$(BIN)/python -m pipeline sweep dashboard

test: $(DEV)
	$(PYTEST) tests/unit

check: $(DEV)
	$(PYTEST) tests/integration

faults: $(DEV)
	$(PYTEST) tests/faults

# Both in one session: no core waits for the last test of the first.
check-faults: $(DEV)
	$(PYTEST) tests/integration tests/faults

# test and check, with the lowest version of each range in pyproject.toml. It needs uv: python -m pip install uv
lowest:
	uv venv --clear --seed --python 3.11 .venv-lowest
	uv pip install --python .venv-lowest --resolution lowest-direct --editable '.[dev]'
	touch .venv-lowest/installed .venv-lowest/installed-dev
	$(MAKE) test check VENV=.venv-lowest

lint: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict # without an announcement of the theme

# requirements/*.txt, from the ranges in pyproject.toml. It needs uv; OPTIONS=--upgrade takes the newest versions.
lock:
	requirements/lock.sh $(OPTIONS)

clean-venv:
	rm -rf .venv .venv-lowest

$(INSTALLED): pyproject.toml requirements/base.txt requirements/torch.txt
	$(PYTHON) requirements/install.py $(VENV) base project --torch $(TORCH)
	touch $@
	$(SCM)

$(VENV)/installed-%: requirements/%.txt $(INSTALLED)
	$(PYTHON) requirements/install.py $(VENV) $*
	touch $@
