# make demo    install into .venv and run the demonstration
# make test    every test
# make check   format, lint and types
PYTHON ?= python3
VENV ?= .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --no-input install --quiet --root-user-action=ignore
FILES := pyproject.toml constraints.txt

.PHONY: demo test check
.DELETE_ON_ERROR:

demo: $(VENV)/installed-demo
	$(VENV)/bin/sfumato demo

test: $(VENV)/installed-dev
	$(VENV)/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(VENV)/installed-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Sfumato needs Python 3.11 or newer"'
	$(PYTHON) -m venv $(VENV)

# A stamp is newer than the files that say what to install, or the installation is made again.
$(VENV)/installed-demo: $(FILES) | $(VENV)/bin/python
	$(PIP) -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/installed-dev: $(FILES) | $(VENV)/bin/python
	$(PIP) -c constraints.txt -e '.[dev,demo]'
	@touch $@ $(VENV)/installed-demo
