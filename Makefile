# make reproduce   every figure and the table of claims at profile quick, in minutes on two CPU cores
# make test        everything that guards the package
# make docs        the documentation site, build/site/index.html
# make look        the site and the report in headless Chromium (apt install chromium), which must have nothing to complain of; pictures in build/shots
# Each installs what it needs into .venv first.

PYTHON ?= python3
BIN := .venv/bin
# One thread per process: several processes with one thread each beat one with several, and threads are part of the arithmetic.
export OMP_NUM_THREADS := 1

.PHONY: reproduce test check docs look clean

reproduce: .venv/installed
	$(BIN)/symbreak reproduce

test: .venv/installed
	$(BIN)/nbdev_test --n_workers 2 --skip_folder_re '^(figures|[_.])'
	$(BIN)/pytest

# Notebooks are clean, and the library is what they export. Works on a copy, so that it changes nothing here.
check: .venv/installed
	$(BIN)/python tests/check_notebooks.py

# Executes nothing: pages show what the notebooks hold, figures what `make reproduce` left.
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --quiet
	$(BIN)/python tests/check_links.py build/site
	@echo Open build/site/index.html

look: docs
	$(BIN)/symbreak report
	$(BIN)/python tests/look_in_browser.py build/site build/report

.venv/installed-docs: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

.venv/installed: constraints.txt settings.ini setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 12) else f"Python {v[0]}.{v[1]} found; symbreak is locked for 3.10 to 3.12: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv || { echo 'Could not make .venv: on Debian, apt install python3-venv' >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf build dist *.egg-info
