package cri

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestSendBatches(t *testing.T) {
	pod := func(id string, bytes int) *runtimeapi.PodSandbox {
		return &runtimeapi.PodSandbox{Id: id, Annotations: map[string]string{"a": strings.Repeat("x", bytes)}}
	}
	many := make([]*runtimeapi.PodSandbox, 10_000)
	for i := range many {
		many[i] = pod(strings.Repeat("f", 64), i%5000)
	}
	tests := map[string]struct {
		items   []*runtimeapi.PodSandbox
		batches int
	}{
		"none":                {nil, 0},
		"one":                 {[]*runtimeapi.PodSandbox{pod("a", 10)}, 1},
		"all in one":          {[]*runtimeapi.PodSandbox{pod("a", 10), pod("b", 10)}, 1},
		"each alone":          {[]*runtimeapi.PodSandbox{pod("a", maxBatch-1000), pod("b", maxBatch-1000)}, 2},
		"larger than a batch": {[]*runtimeapi.PodSandbox{pod("a", 10), pod("b", 5*maxBatch), pod("c", 10)}, 3},
		"many":                {many, 9},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			var got []*runtimeapi.PodSandbox
			var batches int
			err := sendBatches(tt.items, func(items []*runtimeapi.PodSandbox) error {
				size := proto.Size(&runtimeapi.StreamPodSandboxesResponse{PodSandboxes: items})
				if size > maxBatch && len(items) > 1 {
					t.Errorf("a batch of %d items has %d bytes", len(items), size)
				}
				got, batches = append(got, items...), batches+1
				return nil
			})
			if err != nil || !slices.Equal(got, tt.items) || batches != tt.batches {
				t.Fatalf("%d of %d items in %d batches, want %d: %v", len(got), len(tt.items), batches, tt.batches, err)
			}
		})
	}
	broken := errors.New("broken")
	if err := sendBatches(many, func([]*runtimeapi.PodSandbox) error { return broken }); err != broken {
		t.Fatal(err)
	}
}
