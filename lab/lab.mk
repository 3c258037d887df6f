# The lab's verbs. What training needs is large, 5 GB with torch and CUDA: evaluation does without.

.PHONY: lab-test lab-train-test lab-smoke icl-stores

## lab-test: the tests of evaluation
lab-test: $(LAB_VENV)/ready
	$(LAB_VENV)/bin/python -m pytest lab/tests --ignore lab/tests/test_train.py --ignore lab/tests/test_lm_eval.py

## lab-train-test: the tests that need torch: training, lab-smoke among them, and lm-eval against transformers
lab-train-test: models $(LAB_VENV)/ready-to-train
	$(LAB_VENV)/bin/python -m pytest lab/tests/test_train.py lab/tests/test_lm_eval.py

## lab-smoke: train a tiny adapter, serve it, evaluate it
lab-smoke: models $(LAB_VENV)/ready-to-train
	$(LAB_VENV)/bin/python -m pytest lab/tests/test_train.py -k served_and_evaluated

## icl-stores: stores of in-context examples from the data sets, in lab/stores (serve with LORRY__ICL__DIR=lab/stores)
icl-stores: $(LAB_VENV)/ready
	$(LAB_VENV)/bin/python lab/stores.py

$(LAB_VENV)/ready: lab/requirements.txt
	python3 -m venv $(LAB_VENV)
	$(LAB_VENV)/bin/python $(PIP_INSTALL) $<
	touch $@

$(LAB_VENV)/ready-to-train: lab/requirements-train.txt $(LAB_VENV)/ready
	$(LAB_VENV)/bin/python $(PIP_INSTALL) $<
	touch $@
