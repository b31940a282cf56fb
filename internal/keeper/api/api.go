// Package api is what the daemon and its keepers say to each other: the
// generated protocol, and errors that keep their class across it.
//
// It holds no behaviour of either side.
package api

// To regenerate: protoc, and protoc-gen-go and protoc-gen-go-ttrpc of the
// versions in go.mod, have to be in PATH.
//go:generate protoc --go_out=. --go_opt=paths=source_relative --go-ttrpc_out=. --go-ttrpc_opt=paths=source_relative keeper.proto
