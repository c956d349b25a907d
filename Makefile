# Everything sets itself up: only `make` and a `python3` (3.11 or newer) are needed. Caches and
# temporary files stay in the checkout. Each recipe is one plain command, so that make runs it
# without a shell in between, and it sees when make is killed.

PYTHON ?= python3
ROOM := $(PYTHON) -B dev/bootstrap.py
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test servers soak browser bench docs lint types floors oldest corners matrix clean

help:
	@echo "make …"
	@sed -n 's/^\([a-z]*\):  *## /  \1	/p' Makefile

demo:  ## the shop: 2,000 orders on a SQLite file, or on DATABASE_URL; SERVE=1: as a service, at PORT
	@$(ROOM) demo -- python -m examples.shop$(if $(SERVE),.service) $(ARGS)

test:  ## all tests but the long ones, on SQLite and throwaway PostgreSQL 16 and 18 (ARGS="-k name")
	@$(ROOM) demo tests -- python -m pytest --numprocesses 6 --dist loadfile $(ARGS)

servers:  ## PgBouncer, PostgreSQL and MariaDB of Debian, for the tests that need them; as root
	@$(ROOM) tests -- python dev/servers.py

soak:  ## the long runs
	@$(ROOM) tests -- python -m pytest -m soak $(ARGS)

browser:  ## the shop's page in Chromium, which is installed where that can be done
	@$(ROOM) browser -- python dev/browser.py
	@$(ROOM) browser -- python -m pytest -m browser tests/test_shop_browser.py $(ARGS)

bench:  ## the whole comparison with everyone, for the docs: an hour; QUICK=1: two minutes
	@$(ROOM) tests -- python bench/run.py $(if $(QUICK),--quick) $(ARGS)

docs:  ## the docs, into docs/_build
	@$(ROOM) docs -- python -m sphinx --fail-on-warning --keep-going --quiet --doctree-dir .cache/doctrees docs docs/_build

lint:  ## ruff: format and rules
	@$(ROOM) lint -- ruff format --check .
	@$(ROOM) lint -- ruff check .

types:  ## mypy strict, and pyright's completeness at 100 %
	@$(ROOM) lint -- mypy
	@$(ROOM) lint -- pyright --verifytypes engineroom --ignoreexternal

floors:  ## the import contracts
	@$(ROOM) lint -- lint-imports --no-cache --no-logo

oldest:  ## the built wheel: oldest Python with the oldest dependencies
	@$(ROOM) nox -- nox --session oldest -- $(ARGS)

corners:  ## the built wheel: that, and newest Python with the newest dependencies
	@$(ROOM) nox -- nox --tags corners -- $(ARGS)

matrix:  ## the built wheel: every Python of the machine × SQLAlchemy 2.0 and 2.1
	@$(ROOM) nox -- nox --session tests

clean:  ## remove all that was set up or built
	rm -rf .venv .cache .tmp .nox dist docs/_build
