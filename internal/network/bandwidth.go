package network

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// Bandwidth limits a pod's traffic, in bits per second; 0 is no limit.
type Bandwidth struct {
	Ingress, Egress uint64
}

// The annotations by which Kubernetes asks for limits.
const (
	ingressAnnotation = "kubernetes.io/ingress-bandwidth"
	egressAnnotation  = "kubernetes.io/egress-bandwidth"
)

// Bandwidth reads the limits from the pod's annotations. The error wraps
// ErrInvalidArgument.
func (p Pod) Bandwidth() (Bandwidth, error) {
	var b Bandwidth
	for name, rate := range map[string]*uint64{ingressAnnotation: &b.Ingress, egressAnnotation: &b.Egress} {
		value, ok := p.Annotations[name]
		if !ok {
			continue
		}
		r, err := parseRate(value)
		if err != nil {
			return Bandwidth{}, fmt.Errorf("annotation %s: %q: %w: %w", name, value, errdefs.ErrInvalidArgument, err)
		}
		*rate = r
	}
	return b, nil
}

// parseRate reads a Kubernetes quantity such as 10M, 1.5Gi or 1e6. The bounds
// are the kubelet's.
func parseRate(s string) (uint64, error) {
	const least, most = 1e3, 1e15
	number, unit := s, 1.0
	for suffix, factor := range map[string]float64{
		"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15,
		"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "Pi": 1 << 50,
	} {
		if n, ok := strings.CutSuffix(s, suffix); ok {
			number, unit = n, factor
		}
	}
	if strings.ContainsAny(number, "xXpP_iInN") {
		return 0, fmt.Errorf("not a rate such as 10M")
	}
	f, err := strconv.ParseFloat(number, 64)
	if err != nil || math.IsNaN(f) {
		return 0, fmt.Errorf("not a rate such as 10M")
	}
	if f *= unit; f < least || f > most {
		return 0, fmt.Errorf("not between 1k and 1P")
	}
	return uint64(f), nil
}
