# Two commands do everything: `make repro` and `make test`. VENV=path shares one environment between clones.
VENV ?= .venv
PYTHON ?=

export PATH := $(abspath $(VENV))/bin:$(PATH)
export PYTHONPATH := $(CURDIR)
PIPELINE = export SAGE_NB_PARENT=$$PPID; exec "$(abspath $(VENV))/bin/python" -m sage_nb.pipeline

.PHONY: help env hook repro tune replicate verify test bench readme docs lab clean

help:
	@echo "make repro      raw video in, tables and figures out (makes $(VENV) and fetches the sample first)"
	@echo "make tune       the search on dev that found each model's settings (about 15 minutes; not part of make repro)"
	@echo "make replicate  the comparison again on two more sample corpora, made for it (about half an hour; not part of make repro)"
	@echo "make test       every check (makes $(VENV) and fetches the sample first): notebooks, package, tests, the pipeline at a small size"
	@echo "make verify     rebuild from raw video what make repro made of results/, and compare with what is committed"
	@echo "make bench      time every model, extraction and prediction, and write results/{bench,extraction,prediction}.json (about 8 minutes; the efficiency table is made from the first)"
	@echo "make readme     write README.md from nbs/index.ipynb"
	@echo "make docs       the notebooks with their outputs, and the reference of the package, as a site: _site/index.html (executes the notebooks the first time, over 5 minutes of processor time; then about one)"
	@echo "make lab        open the notebooks in JupyterLab, at the index"
	@echo "make clean      remove everything that can be made again (not data, results or the environment)"

repro: env
	@$(PIPELINE) repro

tune: env
	@$(PIPELINE) repro tune

replicate: env
	@$(PIPELINE) repro verdict

verify: env
	@$(PIPELINE) verify

readme: env
	@$(PIPELINE) readme

test: env
	@$(PIPELINE) fetch
	nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

bench: env
	@$(PIPELINE) bench

docs: env
	@exec python docs/build.py

lab: env
	@exec jupyter lab --ServerApp.root_dir="$(CURDIR)" nbs/index.ipynb

clean:
	rm -rf _site work .work .dvc/cache .dvc/tmp build dist sage_nb.egg-info .pytest_cache
	find docs nbs sage_nb tests -name __pycache__ -prune -exec rm -rf {} +

# An environment is complete when it holds a copy of the lock, which is put there last. One that was left
# half-made is made anew: pip takes a package that was cut off while being unpacked for installed.
env: hook
	@cmp -s requirements.lock "$(VENV)/requirements.lock" || { \
	  if [ -d "$(VENV)" ] && [ ! -e "$(VENV)/pyvenv.cfg" ] && [ -n "$$(ls -A "$(VENV)")" ]; then \
	    echo "$(VENV): a folder, but not a virtual environment; remove it or name another with VENV=path" >&2; exit 2; \
	  fi; \
	  if [ -e "$(VENV)/half-made" ] || ! "$(VENV)/bin/python" -m pip --version >/dev/null 2>&1; then \
	    for python in $(PYTHON) python3.11 python3 python3.12 python3.13; do \
	      "$$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; python=; \
	    done; \
	    if [ -z "$$python" ]; then \
	      echo "no Python 3.11 or newer with venv found; install one, or name it with PYTHON=path" >&2; exit 2; \
	    fi; \
	    "$$python" -m venv --clear "$(VENV)"; \
	  fi && \
	  echo "setting up $(VENV) from requirements.lock (about 3 minutes and 7 GB)" && \
	  touch "$(VENV)/half-made" && "$(VENV)/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.lock && \
	  cp requirements.lock "$(VENV)/requirements.lock" && rm "$(VENV)/half-made"; }

# In a checkout of its own, git asks .ci/pre-commit before each commit, unless there is a hook already.
hook:
	@if [ -z "$$(git rev-parse --show-cdup 2>/dev/null || echo none)" ]; then \
	  hook=$$(git rev-parse --git-path hooks/pre-commit); \
	  [ -e "$$hook" ] || { mkdir -p "$$(dirname "$$hook")" && printf '#!/bin/sh\n[ ! -x .ci/pre-commit ] || exec .ci/pre-commit\n' >"$$hook" && chmod +x "$$hook"; }; \
	fi
