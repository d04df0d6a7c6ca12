# Everything starts from here: each target sets up what it needs first.
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help

.PHONY: help venv demo test test-turn test-long test-nightly test-multihost test-all lint docs audit clean

help:
	@echo "make demo             set up, then: pack, train on Ray with DeepSpeed, evaluate, track in MLflow (3 to 5 minutes)"
	@echo "make test             set up, then the tests (10 minutes)"
	@echo "make test-turn        set up, then some of the tests that take minutes: about what changed, and a third of the others"
	@echo "make test-long        set up, then the tests that kill and start again for minutes"
	@echo "make test-nightly     set up, then property tests with many more examples, and the captioning demo (15 minutes)"
	@echo "make test-multihost   set up, then the tests on three Ray nodes in network namespaces (as root; needs iptables)"
	@echo "make test-all         set up, then every test there is (about 100 minutes)"
	@echo "make lint             formatting, lint and types"
	@echo "make docs             set up, then the documentation as a site in build/site; links are checked"
	@echo "make audit            look up the pinned packages' known vulnerabilities"
	@echo "make venv             only set up .venv"

# The stamp is written last, so an interrupted installation is done again.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is %d.%d; name another one: make PYTHON=/path/to/python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs,captions,export,flow,s3,gs,server]'
	@touch $@

venv: .venv/.installed

demo: venv
	$(BIN)/python -m jobs.demo

test: venv
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test-turn: venv
	$(BIN)/python -m pytest -m "long or multihost" --turn --durations 12

test-long: venv
	$(BIN)/python -m pytest -m long

test-nightly: venv
	$(BIN)/python -m pytest -m nightly

test-multihost: venv
	$(BIN)/python -m pytest -m multihost tests/multihost

test-all: test test-long test-nightly test-multihost

lint: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --level error

docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "open build/site/index.html"

audit: venv
	$(BIN)/pip-audit --strict --no-deps --disable-pip -r constraints.txt

clean:
	rm -rf .venv build dist *.egg-info
