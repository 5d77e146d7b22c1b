# Everything a fresh machine needs: python3 (3.11 or newer) with venv, and a package registry.
PY := .venv/bin/python

.PHONY: demo test check fuzz clean

demo: .venv/installed
	.venv/bin/headwater demo --out runs/demo

test: .venv/installed-test
	$(PY) -m pytest

# 5,000 hostile recipes, data files, model folders and run directories, as bounded as the program promises to be.
fuzz: .venv/installed-test
	PYTHONPATH=tests $(PY) tests/fuzz.py --count 5000

check: .venv/installed-check
	.venv/bin/ruff check src tests
	.venv/bin/ruff format --check src tests
	.venv/bin/mypy

.venv/bin/python:
	python3 -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PY) -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(PY) -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

.venv/installed-check: .venv/installed
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[check]'
	touch $@

clean:
	rm -rf .venv runs build dist src/*.egg-info
