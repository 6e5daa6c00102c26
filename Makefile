# tranship: `make help` lists the targets.
SHELL   := bash
VERSION  = $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
MODULE  := github.com/tranship/tranship
# Hosts are namespaces, so what makes them runs as root.
AS_ROOT := $(if $(filter 0,$(shell id -u)),,sudo -E env "PATH=$(PATH)")
# The longest first, so that no processor waits for it at the end.
UNIT     = $(shell go list ./predict/... ./transfer ./...)
# Packages with tests that bring up hosts carry the build tag integration.
HOSTED   = $(sort $(dir $(shell grep -rlE --include='*_test.go' '^//go:build integration' .)))

.PHONY: help build generate lint test demo bench setup clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "%-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## install what building, tests and the lab need (Debian, root; quick when it is there)
	$(AS_ROOT) scripts/setup.sh

build: ## bin/tranship and bin/transhipd
	CGO_ENABLED=0 go build -trimpath -ldflags '-X main.version=$(VERSION)' -o bin/ ./cmd/...

generate: ## protobuf code and BPF objects (needs scripts/setup.sh generate)
	protoc --plugin=$$(go tool -n protoc-gen-go) --plugin=$$(go tool -n protoc-gen-connect-go) \
		--go_out=. --go_opt=module=$(MODULE) --connect-go_out=. --connect-go_opt=module=$(MODULE) daemon/control/tranship.proto
	go generate ./ebpf/...

lint: ## gofmt, vet, staticcheck; golangci-lint with .golangci.yml where it is installed
	@files=$$(gofmt -l .); [ -z "$$files" ] || { echo "gofmt: $$files"; exit 1; }
	go vet -tags integration ./...
	go tool staticcheck -tags integration ./...
	@! command -v golangci-lint >/dev/null || golangci-lint run

test: setup build ## everything: vet, unit tests and, as root, the tests that bring up hosts
	go vet -tags integration ./...
	TRANSHIP_TEST_STRICT=1 go test -vet=off -race -timeout 30m -exec '$(AS_ROOT)' $(UNIT)
	TRANSHIP_TEST_STRICT=1 TRANSHIP_LAB=test go test -vet=off -race -exec '$(AS_ROOT)' -tags integration -p 1 -timeout 40m -count 1 $(HOSTED)

demo: setup build ## move a running Redis between two hosts under the eyes of its clients
	go run -exec '$(AS_ROOT)' ./integration/demo

bench: setup build ## blackout and cost against stock checkpoint and restore, in the lab
	go run -exec '$(AS_ROOT)' ./integration/bench

clean: ## what build and tests left, and labs that are still up
	@[ ! -x bin/tranship ] || for lab in "" test bench; do TRANSHIP_LAB=$$lab $(AS_ROOT) bin/tranship lab down; done
	rm -rf bin
