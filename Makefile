# Everything a fresh machine needs: python3 (3.11 or newer) with venv, and a package registry.
PY := .venv/bin/python

.PHONY: demo test chaos endurance check clean

demo: .venv/installed
	.venv/bin/headwater demo --out runs/demo

test: .venv/installed-test
	$(PY) -m pytest

# Kills, full disks and damage of every kind, then 500 kills at random times; docs/reliability.md says how long it takes.
chaos: .venv/installed-test
	$(PY) -m pytest -m chaos
	$(PY) tests/chaos.py --kills 500

endurance: .venv/installed-test
	$(PY) tests/endurance.py --steps 4000 --nodes 200

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
