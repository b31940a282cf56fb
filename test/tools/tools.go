//go:build tools

// Package tools pins the programs that the tests run. It is a module of its own,
// so that the product does not depend on them.
package tools

import (
	_ "github.com/onsi/ginkgo/v2/ginkgo"
	_ "sigs.k8s.io/cri-tools/cmd/crictl"
	_ "sigs.k8s.io/cri-tools/cmd/critest"
)
