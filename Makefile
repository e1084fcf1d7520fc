# make reproduce   every figure and the table of claims at profile quick, in minutes on two CPU cores
# make test        everything that guards the package: the notebooks, with the outputs that they hold, and tests/
# make soak     for an hour or less, with other examples each time: kills, full disks, flipped bits, any input
# make mutants  in an hour: does something fail for small faults in the library? (MUTANTS='train runs --seed 1')
# make check       in seconds: notebooks clean and exported, lint, and the statistics of the house
# make lab         JupyterLab on the notebooks, in reading order
# make notebooks   exports the library, then executes the notebooks again, in place
# make docs        the documentation site, build/site/index.html
# make bench       speed as ratios, side by side: benchmarks/README.md (on an idle machine)
# make look        the site and the report in headless Chromium (apt install chromium), which must have nothing to complain of; pictures in build/shots
# make hooks       git cleans, exports and lints before each commit, and merges notebooks cell by cell
# Each installs what it needs into .venv first.

PYTHON ?= python3
BIN := .venv/bin
# One thread per process: several processes with one thread each beat one with several, and threads are part of the arithmetic.
export OMP_NUM_THREADS := 1

.PHONY: reproduce test soak mutants check lab notebooks docs look bench hooks clean

reproduce: .venv/installed
	$(BIN)/symbreak reproduce

test: .venv/installed
	$(BIN)/python tools/notebooks.py test nbs/*.ipynb
	$(BIN)/pytest --numprocesses 2 --dist loadfile  # two, since some tests start as many processes themselves

soak: .venv/installed
	$(BIN)/pytest --soak tests/test_soak.py tests/test_damage.py tests/test_any_input.py

mutants: .venv/installed-mutants
	$(BIN)/python tools/mutants.py sample $(MUTANTS)

# Notebooks are clean, and the library is what they export. Works on a copy, so that it changes nothing here.
check: .venv/installed
	$(BIN)/python tools/check_notebooks.py
	$(BIN)/ruff check
	$(BIN)/python tools/house.py

lab: .venv/installed
	mkdir -p .venv/share/jupyter/lab/settings
	cp tools/lab_settings.json .venv/share/jupyter/lab/settings/overrides.json
	$(BIN)/jupyter-lab $(LAB) nbs/README.md

# A figure notebook trains the runs that are missing, so by default only those that `make reproduce` has drawn here are executed.
NBS ?= nbs/*.ipynb $(patsubst figures/quick/%.ipynb,nbs/figures/%_*.ipynb,$(wildcard figures/quick/*.ipynb))
notebooks: .venv/installed
	$(BIN)/nbdev_export
	$(BIN)/python tools/reading_order.py
	$(BIN)/python tools/notebooks.py write $(NBS)

# Executes nothing: pages show what the notebooks hold, figures what `make reproduce` left.
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --quiet
	$(BIN)/python tools/check_links.py build/site
	@echo Open build/site/index.html

look: docs
	$(BIN)/symbreak report
	$(BIN)/python tools/look_in_browser.py build/site build/report

bench: .venv/installed
	$(BIN)/python benchmarks/ratios.py --write
	$(BIN)/python benchmarks/loop_overhead.py --write
	$(BIN)/python benchmarks/epoch_profile.py --write

hooks: .venv/installed
	git config merge.nbdev-merge.name 'notebooks, cell by cell'
	git config merge.nbdev-merge.driver '.venv/bin/nbdev_merge %O %A %B %P'
	$(BIN)/pre-commit install

.venv/installed-docs: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

.venv/installed-mutants: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[mutants]'
	touch $@

.venv/installed: constraints.txt settings.ini setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 14) else f"Python {v[0]}.{v[1]} found; symbreak is locked for 3.10 to 3.13, and 3.14, untried: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv || { echo 'Could not make .venv: on Debian, apt install python3-venv' >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf build dist *.egg-info
