# `make demo` and `make test` each build what they need in .venv and run; nothing else has to be installed but Python 3.11+.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo demo-from-scratch test test-beam test-trackers lint clean

$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

# The critic that comes with the package, as it is and fine-tuned.
demo: $(VENV)/installed
	$(BIN)/python -m rahf.predict --workdir=synth --drawn=24 --output=demo/shipped
	$(BIN)/python -m richhf_data.synthetic --output=demo/records --train=4800 --dev=200 --test=400 --size=96 --seed=0
	$(BIN)/python -m richhf_data.build --records=demo/records --images='parquet:demo/records/images/*.parquet' --data_dir=demo/data
	$(BIN)/python -m rahf.train --config=rahf_synth_demo --workdir=demo/run --config.data.data_dir=demo/data
	$(BIN)/python -m rahf.predict --workdir=demo/run --data_dir=demo/data --split=test --limit=24 --output=demo/run
	$(BIN)/python -m rahf.tables --data_dir=demo/data --rows shipped=synth fine-tuned=demo/run --output=demo/tables

# After `make demo`: the same tables with a critic that is trained from scratch on the same pictures.
demo-from-scratch: $(VENV)/installed
	$(BIN)/python -m rahf.train --config=rahf_synth_tiny --workdir=demo/scratch --config.data.data_dir=demo/data
	$(BIN)/python -m rahf.tables --data_dir=demo/data --rows 'from scratch'=demo/scratch shipped=synth fine-tuned=demo/run --output=demo/tables_from_scratch

lint: $(VENV)/installed
	$(BIN)/ruff check .

test: lint
	$(BIN)/python -m pytest -n 2 --dist=loadfile --no-loadscope-reorder

# The image scan and rahf.score as Apache Beam pipelines, on local runners: Beam wants other versions than constraints.txt.
test-beam:
	$(PYTHON) -m venv $(VENV)-beam
	$(VENV)-beam/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test,beam]'
	$(VENV)-beam/bin/python -m pytest tests/test_scan.py tests/test_score.py -k beam

# Weights & Biases and trackio, without a network: trackio wants another Pillow than constraints.txt.
test-trackers:
	$(PYTHON) -m venv $(VENV)-trackers
	$(VENV)-trackers/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test,trackers]'
	$(VENV)-trackers/bin/python -m pytest tests/test_trackers.py

clean:
	rm -rf $(VENV) $(VENV)-beam $(VENV)-trackers demo
