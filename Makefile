# guixd: see README.rst.  Every target makes or completes .venv first.
.PHONY: demo run test lint bench clean help

help:
	@echo 'make demo   build a small example with a private daemon and show what happened'
	@echo 'make test   checks and tests (as root: all of them; add nothing else to the machine)'
	@echo 'make run    the same daemon as in the demo, in the foreground'
	@echo 'make lint   the checkers only'
	@echo 'make bench  speed, side by side with the stock daemon (root)'
	@echo 'make clean  remove what the others made, .venv included'

demo:
	@tools/setup run
	@.venv/bin/python examples/demo

run:
	@tools/setup run
	@.venv/bin/python examples/demo --serve

test:
	@tools/test

lint:
	@tools/setup dev
	@tools/lint

bench:
	@tools/setup dev
	@.venv/bin/python bench/run.py

clean:
	@for d in .demo .test; do [ ! -e $$d ] || { chmod -R u+rwX $$d; rm -rf $$d; }; done
	rm -rf .venv .venv-* .setup.lock _trial_temp* build dist *.egg-info twisted/plugins/dropin.cache
	rm -rf .hypothesis .mypy_cache .ruff_cache .import_linter_cache .pytest_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
