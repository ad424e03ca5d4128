# gradreg: `make help` lists what there is. Every target works in a fresh clone.
PY = .venv/bin/python
.DEFAULT_GOAL := help
.PHONY: help install export test test-latest test-recipes study bench lab docs seconds install-browser ci-browser clean
SUDO = $(if $(filter 0,$(shell id -u)),,sudo)

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 17

install: .venv/installed ## create .venv and install the package with its development tools

.venv/installed: settings.ini setup.py
	python3 -m venv .venv
	$(PY) -m pip install -q -e '.[dev,ray]'
	touch $@

export: install ## notebooks -> gradreg/*.py and README.md, then clean the notebooks' metadata
	.venv/bin/nbdev_export
	.venv/bin/nbdev_clean
	$(PY) docs/make_readme.py

# three processes of one thread keep two cores busy, for some tests wait
test: install .venv/docs ci-browser ## every check there is, notebooks included (the CI suite)
	$(PY) -m pytest -q -n 3 tests

test-latest: ## the installed package alone, with the newest fastai and fastcore, in a second environment
	python3 -m venv .venv-latest
	.venv-latest/bin/python -m pip install -q -U . pytest
	cd tests && ../.venv-latest/bin/python -m pytest -q -p no:cacheprovider test_latest.py

test-recipes: ## the recipes of the site, with Lightning, Hugging Face and others, in a third environment
	[ -d .venv-recipes ] || python3 -m venv .venv-recipes
	.venv-recipes/bin/python -m pip install -q -e '.[recipes]'
	cd tests && ../.venv-recipes/bin/python -m pytest -q -p no:cacheprovider test_recipes.py

study: install ## the first study: train, compare, write figures and a page (a few minutes)
	.venv/bin/gradreg run digits --results nbs/studies/out/digits

bench: install ## what a penalty costs here, in time and memory, into the results of the studies (some minutes)
	$(PY) -m gradreg.bench

lab: install ## JupyterLab on the book
	.venv/bin/jupyter lab nbs

.venv/docs: .venv/installed
	$(PY) -m pip install -q -e '.[docs]'
	touch $@

docs: .venv/docs ## the site, in docs/_build/html
	$(PY) docs/build.py

seconds: install ## how long each chapter runs on this machine, into docs/seconds.csv
	$(PY) docs/seconds.py

install-browser: ## Debian's chromium, in which `make test` reads the site
	$(SUDO) apt-get update -qq
	$(SUDO) apt-get install -y -qq --no-install-recommends chromium

ci-browser: # a CI machine gets a browser if it can; without one the browser tests are skipped and say so
	@[ -z "$$CI" ] || command -v chromium || command -v google-chrome || $(MAKE) -s install-browser || true

clean: ## remove what make made, environments included
	rm -rf .venv .venv-latest .venv-recipes build dist _docs _proc docs/_build nbs/studies/out *.egg-info
