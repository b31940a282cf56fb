# make              build bin/sampan, with all it carries
# make quickstart   install what a build needs, build, start the daemon, run a pod
# make quickstart-down   remove every trace of it
# make test         install what the tests need, and run them all
# make crash        kill Sampan a thousand times and look whether anything is lost
# make conformance  all of critest, not only what `make test` takes of it
# make fault        a host, runtimes and containers that do not do their part
# make soak         a busy node for DURATION (1h): nothing may grow
# make abuse        random requests, escapes, thousands of clients: more than `make test` has time for
# make fuzz         every fuzz target for FUZZTIME (30s)
# make bench        measure Sampan; ARGS="--only pods,exec" goes to sampan bench
# make bench-compare  measure Sampan and Debian's containerd in turn, and write it to docs/
# make conformance-repeat N=10   the same N times in a row; fails if any run does
# make test-vm      what needs a host of its own, in virtual machines: systemd, cgroups of all kinds, packages
# make deb          a Debian package in bin
# make dist         tarballs in bin, for any Linux, on x86-64 and arm64
# make test-arm64   build for arm64, and run the tests of what needs no C and no kernel of its own under emulation
# make check        formatting, vet, staticcheck
# make generate     write the generated Go code anew (needs protoc)

SHELL := /bin/sh
export PATH := $(CURDIR)/.cache/go/bin:$(CURDIR)/.cache/criu/bin:$(PATH)
export GOTOOLCHAIN := local

VERSION := $(shell cat VERSION)$(shell git describe --always --exclude='*' --dirty=+ 2>/dev/null | sed 's/^/+/')
GO_BUILD := go build -trimpath -buildvcs=false
# What the keeper is built with; the checks look at the same code.
KEEPER_TAGS := netgo,osusergo,seccomp,static_build
KEEPER_LDFLAGS := -s -w -linkmode external -extldflags "-static"
# The launcher has no C library.
LAUNCH_CFLAGS := -Os -Wall -Wextra -Werror -ffreestanding -fno-builtin -fno-stack-protector -fno-asynchronous-unwind-tables \
	-fno-tree-loop-distribute-patterns -nostdlib -static -s -Wl,--build-id=none -Wl,-z,noseparate-code
INIT_CFLAGS := -Os -Wall -Wextra -Werror -static -s
# NRI plugins are programs; without those in WebAssembly the daemon is smaller.
DAEMON_TAGS := nri_no_wasm
SUITES := ./test/quickstart ./test/e2e ./test/conformance ./test/abuse ./test/fault ./test/soak ./test/vm
PACKAGES = $(filter-out $(SUITES:./%=sampan.dev/sampan/%),$(shell go list ./...))

.PHONY: all build deps
all: build
build: bin/sampan
deps:
	@scripts/install-deps build

# Go itself knows best what has changed, so these always ask it.
.PHONY: bin/sampan bin/sampan-keeper bin/sampan-hello
bin/sampan: embed
	CGO_ENABLED=0 $(GO_BUILD) -tags $(DAEMON_TAGS) -ldflags '-s -w -X main.release=$(VERSION)' -o $@ ./cmd/sampan
bin/sampan-keeper: bin/launch
	@scripts/embed bin/launch launch internal/ociruntime/launch/files
	CGO_ENABLED=1 $(GO_BUILD) -tags $(KEEPER_TAGS) -ldflags '$(KEEPER_LDFLAGS)' -o $@ ./cmd/sampan-keeper
bin/sampan-hello:
	CGO_ENABLED=0 $(GO_BUILD) -ldflags '-s -w' -o $@ ./cmd/sampan-hello
bin/launch: $(wildcard cmd/sampan-launch/*.[ch])
	@mkdir -p bin
	$(CC) $(LAUNCH_CFLAGS) -o $@ cmd/sampan-launch/launch.c
bin/init: $(wildcard cmd/sampan-init/*.c)
	@mkdir -p bin
	$(CC) $(INIT_CFLAGS) -o $@ cmd/sampan-init/*.c

.PHONY: embed
embed: bin/sampan-keeper bin/sampan-hello bin/init
	@scripts/embed bin/sampan-keeper keeper
	@scripts/embed bin/sampan-hello hello
	@scripts/embed bin/init init

# The same with fault points, for test/crash; RACE=1 with the race detector too.
FAULT := bin/faultpoints
FAULT_CGO = $(if $(RACE),1,0)
.PHONY: faultpoints
faultpoints: bin/sampan-hello bin/init bin/launch
	@mkdir -p $(FAULT)
	@scripts/embed bin/launch launch internal/ociruntime/launch/files
	CGO_ENABLED=1 $(GO_BUILD) $(if $(RACE),-race) -tags $(KEEPER_TAGS),faultpoints -ldflags '$(KEEPER_LDFLAGS)' -o $(FAULT)/sampan-keeper ./cmd/sampan-keeper
	@scripts/embed $(FAULT)/sampan-keeper keeper internal/embedded/files-faultpoints
	@scripts/embed bin/sampan-hello hello internal/embedded/files-faultpoints
	@scripts/embed bin/init init internal/embedded/files-faultpoints
	CGO_ENABLED=$(FAULT_CGO) $(GO_BUILD) $(if $(RACE),-race) -tags faultpoints -ldflags '-X main.release=$(VERSION)' -o $(FAULT)/sampan ./cmd/sampan

# The same for arm64, in bin/arm64, with Debian's compiler for it. What a program
# carries, it takes from there by an overlay of the source tree.
ARM64 := bin/arm64
ARM64_CC := aarch64-linux-gnu-gcc
ARM64_GO = GOARCH=arm64 $(GO_BUILD) -overlay $(ARM64)/overlay.json
ARM64_CGO = CGO_ENABLED=1 CC=$(ARM64_CC) PKG_CONFIG_LIBDIR=$(CURDIR)/.cache/arm64/usr/lib/aarch64-linux-gnu/pkgconfig PKG_CONFIG_SYSROOT_DIR=$(CURDIR)/.cache/arm64
.PHONY: arm64 test-arm64
arm64:
	@scripts/install-deps arm64
	@scripts/fetch-arm64
	@mkdir -p $(ARM64)
	$(ARM64_CC) $(LAUNCH_CFLAGS) -o $(ARM64)/launch cmd/sampan-launch/launch.c
	$(ARM64_CC) $(INIT_CFLAGS) -o $(ARM64)/init cmd/sampan-init/*.c
	CGO_ENABLED=0 GOARCH=arm64 $(GO_BUILD) -ldflags '-s -w' -o $(ARM64)/hello ./cmd/sampan-hello
	@scripts/overlay $(ARM64) launch
	$(ARM64_CGO) $(ARM64_GO) -tags $(KEEPER_TAGS) -ldflags '$(KEEPER_LDFLAGS)' -o $(ARM64)/keeper ./cmd/sampan-keeper
	@scripts/overlay $(ARM64) launch keeper hello init
	CGO_ENABLED=0 $(ARM64_GO) -tags $(DAEMON_TAGS) -ldflags '-s -w -X main.release=$(VERSION)' -o $(ARM64)/sampan ./cmd/sampan

# What needs neither a kernel of its own nor to start itself again, which an
# emulated program cannot without the host's help.
ARM64_TESTS := ./internal/state ./internal/config ./internal/checkpoint ./internal/cri ./internal/flight ./internal/inflate ./internal/registry \
	./internal/keeper/logs ./internal/ociruntime/launch
test-arm64: arm64
	qemu-aarch64 $(ARM64)/sampan version
	CGO_ENABLED=0 GOARCH=arm64 go test -vet=off -exec qemu-aarch64 -skip '^TestKilled$$' $(ARM64_TESTS)
	$(ARM64_CGO) GOARCH=arm64 go test -vet=off -exec 'qemu-aarch64 -L /usr/aarch64-linux-gnu' ./internal/spec

.PHONY: quickstart quickstart-down
quickstart:
	@scripts/install-deps quickstart
	@$(MAKE) --no-print-directory build
	@scripts/quickstart
quickstart-down:
	@scripts/quickstart-down

.PHONY: test unit suites conformance
test:
	@scripts/install-deps test
	-@scripts/fetch-criu
	$(MAKE) build
	$(MAKE) check
	$(MAKE) unit
	$(MAKE) suites

# The whole tree but the suites, which need the built binary.
unit:
	go test -race -tags seccomp -timeout 10m $(PACKAGES)
suites:
	SAMPAN_TEST_BIN=$(CURDIR)/bin/sampan go test -tags seccomp -count 1 -p 1 -timeout 30m -v $(SUITES)
	$(MAKE) faultpoints
	$(CRASH) -timeout 10m -v ./test/crash
# RACE=1 runs a daemon and keepers with the race detector.
CRASH := SAMPAN_TEST_BIN=$(CURDIR)/bin/faultpoints/sampan go test -tags seccomp -count 1
.PHONY: crash
crash: faultpoints
	$(CRASH) -timeout 60m -v ./test/crash -args -crash.long
conformance:
	@scripts/install-deps test
	$(MAKE) build
	SAMPAN_CONFORMANCE=all SAMPAN_TEST_BIN=$(CURDIR)/bin/sampan go test -tags seccomp -count 1 -timeout 60m -v ./test/conformance

# The suites on a daemon and keepers with the race detector; each fails of a race.
.PHONY: race
race:
	@scripts/install-deps test
	$(MAKE) faultpoints RACE=1
	$(CRASH) -p 1 -timeout 60m -v $(filter-out ./test/quickstart ./test/vm,$(SUITES)) ./test/crash

.PHONY: abuse fault soak fuzz
fault:
	@scripts/install-deps test
	$(MAKE) build
	SAMPAN_TEST_BIN=$(CURDIR)/bin/sampan go test -tags seccomp -count 3 -timeout 30m -v ./test/fault
soak:
	@scripts/install-deps test
	$(MAKE) build
	SAMPAN_SOAK=$(or $(DURATION),1h) SAMPAN_TEST_BIN=$(CURDIR)/bin/sampan go test -tags seccomp -count 1 -timeout 0 -v ./test/soak
abuse:
	@scripts/install-deps test
	$(MAKE) build
	ulimit -n "$$(ulimit -Hn)"; SAMPAN_ABUSE_SEED=$${SAMPAN_ABUSE_SEED:-$$(date +%s)} SAMPAN_ABUSE_REQUESTS=40000 SAMPAN_ABUSE_CLIENTS=10000 SAMPAN_ABUSE_EXECS=1000 SAMPAN_ABUSE_LINE_MIB=1024 \
		SAMPAN_TEST_BIN=$(CURDIR)/bin/sampan go test -tags seccomp -count 1 -timeout 30m -v ./test/abuse
fuzz:
	@scripts/install-deps build
	@$(MAKE) --no-print-directory embed
	@FUZZTIME=$(FUZZTIME) scripts/fuzz

# Results go to .cache/bench.
BENCH = SAMPAN_TEST_BIN=$(CURDIR)/bin/sampan SAMPAN_BENCH_ARGS="$(ARGS)" SAMPAN_BENCH_OUT=$(CURDIR)/.cache/bench
.PHONY: bench bench-compare
bench: build
	@scripts/install-deps test
	@mkdir -p .cache/bench
	$(BENCH) SAMPAN_BENCH=sampan go test -count 1 -timeout 90m -v -run TestBench ./test/bench
bench-compare: build
	@scripts/install-deps test
	@mkdir -p .cache/bench
	$(BENCH) SAMPAN_BENCH=compare go test -count 1 -timeout 120m -v -run TestCompare ./test/bench
	scripts/bench-docs .cache/bench/compare

.PHONY: conformance-repeat
N ?= 10
conformance-repeat: build
	SAMPAN_CONFORMANCE=all SAMPAN_TEST_BIN=$(CURDIR)/bin/sampan go test -tags seccomp -count $(N) -timeout 12h -v ./test/conformance

# The suites that need a host of their own, each in a virtual machine.
.PHONY: test-vm
test-vm:
	@scripts/install-deps test
	$(MAKE) deb faultpoints
	SAMPAN_VM=all SAMPAN_TEST_BIN=$(CURDIR)/bin/sampan go test -tags seccomp -count 1 -timeout 180m -v ./test/vm

.PHONY: deb dist
deb: build
	scripts/package-deb '$(VERSION)'
dist: build arm64
	scripts/package-tar '$(VERSION)' amd64 bin/sampan
	scripts/package-tar '$(VERSION)' arm64 $(ARM64)/sampan

.PHONY: check
check: .cache/bin/staticcheck
	@unformatted=$$(gofmt -l cmd internal test); if [ -n "$$unformatted" ]; then echo "gofmt -w needed:"; echo "$$unformatted"; exit 1; fi
	go vet -tags seccomp ./...
	.cache/bin/staticcheck -tags seccomp ./...

.cache/bin/%: tools/go.mod tools/go.sum
	@mkdir -p $(@D)
	cd tools && go build -o $(CURDIR)/$@ $$(go list tool | grep '/$*$$')

# Written with protoc 3.21; the plugins are pinned in tools/.
.PHONY: generate
generate: .cache/bin/protoc-gen-go .cache/bin/protoc-gen-go-grpc .cache/bin/protoc-gen-go-ttrpc
	PATH=$(CURDIR)/.cache/bin:$$PATH go generate ./...

.PHONY: clean
clean:
	rm -rf bin .cache internal/ociruntime/launch/files/launch* internal/embedded/files/keeper* internal/embedded/files/init* internal/embedded/files/hello*
