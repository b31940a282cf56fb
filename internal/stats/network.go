package stats

import (
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

type links struct{}

func (l *links) close() {}

func (c *Collector) networkUsage(p Pod) *runtimeapi.NetworkUsage { return nil }
