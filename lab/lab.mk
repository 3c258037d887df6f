# The lab's verbs. Its Python packages are large (5 GB with torch and CUDA), so they have an environment of their own.

LAB_VENV := .venv-lab

.PHONY: lab-test lab-smoke icl-stores

## lab-test: the lab's tests, lab-smoke among them
lab-test: models $(LAB_VENV)/ready
	$(LAB_VENV)/bin/python -m pytest lab/tests

## lab-smoke: train a tiny adapter, serve it, evaluate it
lab-smoke: models $(LAB_VENV)/ready
	$(LAB_VENV)/bin/python -m pytest lab/tests/test_train.py -k served_and_evaluated

## icl-stores: stores of in-context examples from the data sets, in lab/stores (serve with LORRY__ICL__DIR=lab/stores)
icl-stores: $(LAB_VENV)/ready
	$(LAB_VENV)/bin/python lab/stores.py

$(LAB_VENV)/ready: lab/requirements.txt
	python3 -m venv $(LAB_VENV)
	$(LAB_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	touch $@
