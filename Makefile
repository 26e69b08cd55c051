# Every routine of the project. `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
IFACE ?=
# Behind sudo, what root runs leaves no files of root's in the caller's checkout.
ifdef SUDO_UID
export PYTHONDONTWRITEBYTECODE := 1
endif
ARGS ?=

.PHONY: help setup run test lint demo bench bench-log soak fuzz lock clean
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: ## virtual environment, locked packages, compiled code
	@command -v $(PYTHON) >/dev/null || { echo "setup: no $(PYTHON): install Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) tools/bootstrap.py

run: setup ## start the relay: sudo make run IFACE=lo [ARGS="--config relay.toml"]
	@test -n "$(IFACE)$(ARGS)" || { echo "run: no interface: sudo make run IFACE=lo" >&2; exit 1; }
	@exec $(BIN)/mcrd $(foreach interface,$(IFACE),--interface $(interface)) $(ARGS)

test: setup ## every test: unit, property, processes, and real traffic in network namespaces (as root)
	@$(PYTHON) tools/bootstrap.py --programs
	@$(BIN)/python -m $(if $(ARGS),pytest $(ARGS),tools.suite)

lint: setup ## ruff and strict types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

demo: setup ## ten seconds of relayed traffic in network namespaces of its own (as root)
	@$(BIN)/python -m tools.demo

bench: setup ## the relay beside its peers: throughput, CPU, latency … (as root) [ARGS="--quick"]
	@$(PYTHON) tools/bootstrap.py --programs
	@$(BIN)/python -m tools.bench.relay $(ARGS)

bench-log: setup ## what a log record costs, beside other libraries, and what the relay pays for it (as root)
	@$(BIN)/python -m tools.bench.logging $(ARGS)

soak: setup ## faults at random under traffic (as root) [ARGS="--minutes 60"]; 100 million log records, 10 000 killed writers
	@MCR_STRESS_RECORDS=$${MCR_STRESS_RECORDS:-100000000} MCR_STRESS_KILLS=$${MCR_STRESS_KILLS:-10000} \
		$(BIN)/python -m pytest -o timeout=86400 -rP tests/system/test_soak.py tests/logging_shm/test_stress.py \
		$(or $(ARGS),--minutes 10)

# What is unset is as long as the long run; a time given with --minutes takes the place of frames and segments.
FUZZ := tests/fuzz tests/system/test_hostile_worker.py tests/relay/test_framing.py $(wildcard tests/system/test_control_socket.py)
fuzz: setup ## the fuzz tests' long run: frames, segments, counters, messages (as root) [ARGS="--minutes 10"]
	@MCR_FUZZ_FRAMES=$${MCR_FUZZ_FRAMES:-10000000} MCR_FUZZ_SEGMENTS=$${MCR_FUZZ_SEGMENTS:-1000000} \
		MCR_FUZZ_MESSAGES=$${MCR_FUZZ_MESSAGES:-1000000} $(BIN)/python -m pytest -o timeout=7200 -rP $(FUZZ) $(ARGS)

lock: ## renew requirements.lock from pyproject.toml (needs uv)
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --extra dev \
		--no-emit-index-url --no-header pyproject.toml -o requirements.lock

clean: ## remove what setup made
	rm -rf .venv *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
