# make demo: see it work. make test: run the tests. Both need Python 3.10 to 3.13 and make, and install the rest.

PYTHON ?= python3
# The Airflow to use: a file in constraints/ pins it and all that comes with it.
AIRFLOW ?= 3.3
MUTANTS ?= airflow_provider_dify*

# Where pyenv keeps the Pythons, let it find each by its name.
ifneq ($(shell command -v pyenv),)
export PYENV_VERSION := $(shell echo "$$(pyenv version-name):$$(pyenv versions --bare | grep -E '^3\.1[0-3]\.' | paste -sd: -)")
endif
PYTHON_VERSION := $(shell PYENV_VERSION="$(PYENV_VERSION)" $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null)
VENV := .venv/airflow-$(AIRFLOW)-python$(PYTHON_VERSION)
CONSTRAINTS := constraints/airflow-$(AIRFLOW).txt
AIRFLOWS := $(sort $(filter-out %-docs %-cluster,$(patsubst constraints/airflow-%.txt,%,$(wildcard constraints/airflow-*.txt))))
PYTHONS := 3.10 3.11 3.12 3.13
# Without bytecode each of Airflow's many processes would compile Airflow again, for seconds.
unexport PYTHONDONTWRITEBYTECODE
ifneq ($(MAKECMDGOALS),clean)
ifeq ($(filter $(AIRFLOW),$(AIRFLOWS)),)
$(error There is no AIRFLOW=$(AIRFLOW) here. Choose one of: $(AIRFLOWS))
endif
# test-ui installs Airflow 2.11, too.
ifneq ($(filter 2.11% 3.0%,$(AIRFLOW))$(filter test-ui,$(MAKECMDGOALS)),)
PYTHONS := $(filter-out 3.13,$(PYTHONS))
endif
ifeq ($(filter $(PYTHON_VERSION),$(PYTHONS)),)
$(error PYTHON=$(PYTHON) is $(if $(PYTHON_VERSION),Python $(PYTHON_VERSION),not installed). $(or $(filter test-ui,$(MAKECMDGOALS)),Airflow $(AIRFLOW)) is tested on Python $(PYTHONS))
endif
endif
PIP_INSTALL = $(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python

.PHONY: demo test test-long test-matrix test-cluster test-ui mutants lint docs package smoke check-release try-release bench constraints clean

# DIFY=1.13.0 chooses the version that the stand-in for Dify speaks like.
demo: $(VENV)/installed
	$(VENV)/bin/python scripts/demo.py $(DIFY)

# What one wants after each change: 4 to 5 minutes. PYTEST_ARGS="-k sensor" chooses tests.
test: $(VENV)/installed
	@$(VENV)/bin/python scripts/run_tests.py $(PYTEST_ARGS)

# All other tests, about 10 minutes: more dialects of Dify and ways to wait, connections cut at any byte, more real
# Airflow processes.
test-long: $(VENV)/installed
	@$(VENV)/bin/python scripts/run_tests.py --long $(PYTEST_ARGS)

# Runs make test and make test-long in every environment of noxfile.py, for some hours, and says in the end how each went.
# NOX_ARGS="--tags 3.0 python3.13" chooses those of this Airflow or this Python.
test-matrix: .venv/nox/installed
	.venv/nox/bin/nox $(NOX_ARGS)

.venv/nox/installed:
	$(PYTHON) -m venv --clear .venv/nox
	.venv/nox/bin/python -m pip install --quiet --disable-pip-version-check nox
	touch $@

lint: $(VENV)/installed
	$(PIP_INSTALL) --constraints $(CONSTRAINTS) --group lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(if $(wildcard .github),$(VENV)/bin/zizmor --offline --quiet .github)

# Changes the package a little in some thousand ways, one at a time, and lists the changes that no unit test notices.
# Takes an hour or two; resumes where it was stopped. MUTANTS="airflow_provider_dify.runs.waiting*" chooses modules.
mutants: $(VENV)/installed
	$(PIP_INSTALL) --constraints $(CONSTRAINTS) --group mutants
	$(VENV)/bin/mutmut run "$(MUTANTS)"
	$(VENV)/bin/mutmut results

# Builds build/docs/index.html from docs/ and the docstrings, and follows the links between its pages. A warning is an
# error. REPOSITORY_URL=https://... adds edit links.
docs: .venv/docs/installed
	@echo "Building build/docs, which takes half a minute."
	rm -rf build/docs
	REPOSITORY_URL="$(REPOSITORY_URL)" .venv/docs/bin/sphinx-build --fail-on-warning --keep-going --fresh-env --quiet docs build/docs
	.venv/docs/bin/python scripts/check_site.py build/docs

.venv/docs/installed: pyproject.toml constraints/airflow-3.3-docs.txt
	@echo "Installing Sphinx and Airflow into .venv/docs, which takes a minute or two."
	$(PYTHON) -m venv --clear .venv/docs
	.venv/docs/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv/docs/bin/uv pip install --quiet --python .venv/docs/bin/python \
		--constraints constraints/airflow-3.3-docs.txt --editable . --group docs
	touch $@

package: $(VENV)/installed
	$(PIP_INSTALL) --constraints $(CONSTRAINTS) --group build
	rm -rf dist
	@echo "Building sdist and wheel, which takes a few seconds."
	$(VENV)/bin/python -m build --installer uv --outdir dist . > /dev/null
	$(VENV)/bin/twine check --strict dist/*

# Installs dist/*.whl with AIRFLOW into an environment of its own and runs the demo there, away from the sources.
smoke:
	@PYTHON="$(PYTHON)" scripts/smoke.sh $(AIRFLOW)

# Checks that TAG, the package's version and the changelog name the same version, and that the package names
# REPOSITORY_URL, if that is set.
check-release: $(VENV)/installed
	$(VENV)/bin/python scripts/check_release.py "$(TAG)" --repository-url "$(REPOSITORY_URL)"

# Uploads dist/* to a package index on this machine, installs it from there with AIRFLOW, and runs the demo.
try-release: $(VENV)/installed
	$(PIP_INSTALL) --constraints $(CONSTRAINTS) --group build
	PYTHON="$(PYTHON)" scripts/try_release.sh $(AIRFLOW) $(VENV)/bin/python

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	@echo "Installing Airflow $(AIRFLOW) for Python $(PYTHON_VERSION) into $(VENV), which takes a minute or two."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) uv
	@$(PIP_INSTALL) --constraints $(CONSTRAINTS) --editable . --group test
	@touch $@

# Compares waits and batches of this provider with those of others. Needs Linux, Python 3.11 or later, and a quarter of an
# hour.
bench: .venv/bench/installed
	.venv/bench/bin/python benchmarks/bench.py

.venv/bench/installed: pyproject.toml constraints/airflow-3.3.txt benchmarks/requirements.txt
	@echo "Installing Airflow and other providers into .venv/bench, which takes a minute or two."
	$(PYTHON) -m venv --clear .venv/bench
	.venv/bench/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints/airflow-3.3.txt uv
	.venv/bench/bin/uv pip install --quiet --python .venv/bench/bin/python --constraints constraints/airflow-3.3.txt \
		--editable . --requirements benchmarks/requirements.txt
	touch $@

# Waits on a cluster (PostgreSQL, Celery on Redis, two workers, two triggerers) while its processes are killed, and counts
# what a wait costs, and what rows cost as mapped tasks and in a batch. Needs Linux and half an hour; as root on Debian it installs PostgreSQL and Redis if need be.
# PYTEST_ARGS="-k soak" chooses tests, SOAK_SEED=1 the soak's random numbers.
test-cluster: .venv/cluster/installed
	tests/cluster/install_servers.sh
	.venv/cluster/bin/python -m pytest --capture=no tests/cluster $(PYTEST_ARGS)

.venv/cluster/installed: pyproject.toml constraints/airflow-3.3-cluster.txt tests/cluster/requirements.txt
	@echo "Installing Airflow and Celery into .venv/cluster, which takes a minute or two."
	$(PYTHON) -m venv --clear .venv/cluster
	.venv/cluster/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints/airflow-3.3-cluster.txt uv
	.venv/cluster/bin/uv pip install --quiet --python .venv/cluster/bin/python --constraints constraints/airflow-3.3-cluster.txt \
		--editable . --group test --requirements tests/cluster/requirements.txt
	touch $@

# Goes through the UI of Airflow 3.3 and 2.11 in Debian's Chromium, and takes the documentation's screenshots on the way.
# Needs Python 3.10 to 3.12.
test-ui: .venv/ui-3.3/installed .venv/ui-2.11/installed
	command -v chromium > /dev/null || { apt-get update && apt-get install --yes --no-install-recommends chromium fonts-dejavu-core; }
	.venv/ui-3.3/bin/python -m pytest --exitfirst tests/ui --screenshots docs/images $(PYTEST_ARGS)
	.venv/ui-2.11/bin/python -m pytest --exitfirst tests/ui --screenshots docs/images $(PYTEST_ARGS)

.venv/ui-%/installed: pyproject.toml constraints/airflow-%.txt tests/ui/requirements.txt
	@echo "Installing Airflow $* and Playwright into $(@D), which takes a minute or two."
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints/airflow-$*.txt uv
	$(@D)/bin/uv pip install --quiet --python $(@D)/bin/python --constraints constraints/airflow-$*.txt \
		--editable . --group test --requirements tests/ui/requirements.txt
	touch $@

# Pins again what is tested with. Looks at the package index.
constraints:
	scripts/pin.sh

clean:
	rm -rf .venv build dist mutants .pytest_cache .mypy_cache .ruff_cache
