# The verbs of this project; CI runs the same ones (.ci/run). Models go to $LORRY_HOME, by default ~/.cache/lorry.

LORRY        := target/release/lorry
TEST_MODELS  := smollm2:135m qwen2.5-coder:0.5b
VENV         := .venv
LAB_VENV     := .venv-lab
PEERS_VENV   := .venv-peers
PIP_INSTALL  := -m pip install --quiet --disable-pip-version-check --no-compile --requirement
CUDA         := kernels/cuda
CUDA_VENV    := .venv-cuda
GPU_BINARIES := target/gpu
PAGE         := tests/page
SDKS         := tests/sdks
BENCH        ?= --prompt-tokens 128 --batch 8 --num-adapters 1
LOADTEST     ?= --help

.PHONY: serve test environments build fmt lint unit cuda ptx gpu-binaries test-gpu bench-gpu compiler clients contract page browser daemons models bench bench-test loadtest clean-venv

## serve: the default model and the adapters of ./adapters on 127.0.0.1:8080
serve: build
	$(LORRY) serve

## test: everything that CI checks. The packages of the tests come while the first crates compile.
test:
	$(MAKE) --jobs 3 lint environments
	$(MAKE) unit cuda clients page bench-test lab-test lab-train-test

## environments: what the tests need beside Rust
environments: $(VENV)/ready $(CUDA_VENV)/ready $(PEERS_VENV)/ready $(LAB_VENV)/ready-to-train compiler browser daemons $(PAGE)/node_modules/ready $(SDKS)/node_modules/ready

build:
	cargo build --release --locked

## fmt: format the code
fmt:
	cargo fmt --all

## lint: format, clippy and house rules, without changing anything
lint: compiler
	cargo fmt --all --check
	cargo clippy --release --locked --workspace --all-targets -- -D warnings
	.ci/house-rules

## unit: the Rust tests, unit and integration, but those that run CUDA kernels. Forty programs of this package are linked for it:
## optimized less, that takes minutes less. The last line brings the server back that is optimized as it is shipped.
unit: models compiler
	cargo test --release --locked --workspace --exclude emulator --config profile.release.package.lorry.opt-level=1
	cargo build --release --locked

## cuda: whether the committed PTX is that of the CUDA sources and fits into the cards, and the kernels on the CPU
cuda: $(CUDA_VENV)/ready compiler
	$(CUDA_VENV)/bin/python $(CUDA)/ptx.py check
	cargo test --release --locked --package emulator

## gpu-binaries: what test-gpu and bench-gpu run, in a folder that can be carried to a machine without Rust
gpu-binaries: build compiler
	mkdir -p $(GPU_BINARIES)
	cp $(LORRY) $(GPU_BINARIES)
	for test in promises_gpu fidelity_gpu; do \
		cp "$$(cargo test --release --locked --no-run --test $$test 2>&1 | sed -n 's/^ *Executable .*(\(.*\))$$/\1/p')" $(GPU_BINARIES)/$$test || exit 1; \
	done
	strip $(GPU_BINARIES)/*

## test-gpu: the promises and the fidelity of the CUDA kernels on a card; ends within nine minutes
test-gpu: | $(GPU_BINARIES)
	python3 benches/gpu/gpu.py test

## bench-gpu: decode, prefill and adapters on a card, against the most that it can do; ends within nine minutes
bench-gpu: | $(GPU_BINARIES)
	python3 benches/gpu/gpu.py bench

$(GPU_BINARIES):
	$(MAKE) gpu-binaries

## ptx: write the PTX that the binary carries, after a change of the CUDA sources
ptx: $(CUDA_VENV)/ready
	$(CUDA_VENV)/bin/python $(CUDA)/ptx.py build

# A C++ compiler, for the CUDA kernels on the CPU; installed where that is allowed.
compiler:
	@command -v g++ > /dev/null \
		|| { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq --no-install-recommends g++; } \
		|| { echo "the CUDA kernels are tested as C++: apt-get install g++" >&2; exit 1; }

## clients: the libraries and agents that clients are made of, unmodified, against the running binary
clients: models $(VENV)/ready browser daemons $(PAGE)/node_modules/ready $(SDKS)/node_modules/ready
	$(VENV)/bin/python -m pytest tests/clients

## contract: five minutes of requests that schemathesis makes up from /openapi.json; a part of clients, for longer
contract: models $(VENV)/ready
	SCHEMATHESIS_SECONDS=300 $(VENV)/bin/python -m pytest -s tests/clients/test_openapi.py

## page: the compare page in a real Chromium with made-up models, or with those of a running server: LORRY_URL=http://…
page: browser $(PAGE)/node_modules/ready
	for test in $(PAGE)/*.test.mjs; do node --test $$test || exit 1; done

# Chromium and Node.js; installed where that is allowed, and not beside the compiler: apt-get has one lock.
browser: | compiler
	@{ command -v chromium && command -v npm; } > /dev/null \
		|| { [ "$$(id -u)" = 0 ] && apt-get update -qq \
			&& apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core $$(command -v npm > /dev/null || echo nodejs npm); } \
		|| { echo "make page needs Chromium and Node.js: apt-get install chromium nodejs npm" >&2; exit 1; }

## daemons: HAProxy, Prometheus and systemd's checker, for the tests of deploy/; whoever may not install them is told that those are skipped
daemons: | browser
	@{ command -v haproxy && command -v promtool && command -v systemd-analyze; } > /dev/null \
		|| { [ "$$(id -u)" != 0 ] && echo "the tests of deploy/ will be skipped: apt-get install haproxy prometheus systemd"; } \
		|| { apt-get update -qq && apt-get install -y -qq --no-install-recommends haproxy prometheus systemd; }

## models: fetch what the tests need
models: build
	for model in $(TEST_MODELS); do $(LORRY) pull $$model || exit 1; done

## bench: prefill, decode and time to first token, one JSON line per run behind one of the limits; options in BENCH
bench: build
	$(LORRY) bench $(BENCH)

## loadtest: a running server at one rate after the other, its knee found and plotted; options in LOADTEST
loadtest: build $(VENV)/ready
	$(VENV)/bin/python deploy/loadtest/attack.py $(LOADTEST)

## bench-test: the scripts of benches/, as far as they come without a card and without peers
bench-test: models $(PEERS_VENV)/ready
	$(PEERS_VENV)/bin/python -m pytest benches

## clean-venv: forget the Python environments
clean-venv:
	rm -rf $(VENV) $(CUDA_VENV) $(PEERS_VENV) $(LAB_VENV)

# Sweep's client also asks for a llama.cpp to compile, which it does without here.
$(VENV)/ready: tests/clients/requirements.txt tests/clients/requirements-sweep.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/python $(PIP_INSTALL) $<
	$(VENV)/bin/python $(PIP_INSTALL) tests/clients/requirements-sweep.txt --no-deps
	touch $@

# ptxas needs nothing of what its package asks for.
$(CUDA_VENV)/ready: $(CUDA)/requirements.txt
	python3 -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python $(PIP_INSTALL) $< --no-deps
	touch $@

$(PEERS_VENV)/ready: benches/peers/requirements.txt
	python3 -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/python $(PIP_INSTALL) $<
	touch $@

$(PAGE)/node_modules/ready $(SDKS)/node_modules/ready: %/node_modules/ready: %/package.json | browser
	cd $* && npm install --no-package-lock --no-audit --no-fund --ignore-scripts
	touch $@

include lab/lab.mk
