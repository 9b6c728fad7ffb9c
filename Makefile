# make reproduce: every artefact at smoke scale   make test: all checks   make lab: JupyterLab on the front page   make book: the documentation as a web site
PYTHON ?= python3
SCALE ?= smoke
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help reproduce test lab book clean

help:
	@sed -n '1s/^# //p' Makefile | sed 's/   /\n/g'

$(READY): settings.ini setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[lab,dev]"
	@touch $(READY)

reproduce: $(READY)
	$(BIN)/snnkd reproduce all studies --scale $(SCALE) -j $(JOBS)

test: $(READY)
	$(BIN)/python -m pytest tests -n 2 --dist worksteal --max-worker-restart 1000 -q

lab: $(READY)
	$(BIN)/jupyter lab nbs/index.ipynb

book: $(READY)
	$(BIN)/snnkd book

clean:
	rm -rf .venv *.egg-info build dist results/progress results/notebooks
