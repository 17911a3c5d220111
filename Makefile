PYTHON ?= python3
.DEFAULT_GOAL := help
.PHONY: help setup demo run test check clean

help:  ## show this list
	@$(PYTHON) -c "import re; print(*('  make %-8s %s' % m for m in re.findall(r'^(\w+):  ## (.*)', open('Makefile').read(), re.M)), sep='\n')"

setup:  ## create .venv and find or install ComfyUI
	@$(PYTHON) -m demo setup

demo:  ## draw and edit with the bundled workflow on the embedded model
	@$(PYTHON) -m demo

run:  ## open ComfyUI with the pack in the browser
	@$(PYTHON) -m demo serve

test:  ## set up and run every test
	@$(PYTHON) -m demo test

check:  ## lint and static tests
	@$(PYTHON) -m demo check

clean:  ## remove .venv, .demo and caches
	@$(PYTHON) -m demo clean
