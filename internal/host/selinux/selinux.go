// Package selinux gives pods and containers their SELinux labels, and files the
// labels with which containers can use them.
//
// A label is USER:ROLE:TYPE:LEVEL. Those of containers differ in their level: two
// categories that no other pod has, so that a process that breaks out of its
// container finds that it may touch nothing of the others.
package selinux

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/selinux/go-selinux"
)

// Labels are those of a pod or a container. The zero Labels are of one that SELinux
// does not confine.
type Labels struct {
	Process string `json:"process,omitempty"` // empty: that of the process that starts it
	Mount   string `json:"mount,omitempty"`   // of its files
}

// Options are the parts of a label that were asked for.
type Options struct{ User, Role, Type, Level string }

// Config is what a host's policy says.
type Config struct {
	// Process and File are the labels that the policy has for containers and their
	// files; their levels do not matter. Without Process, nothing is labelled.
	Process, File string
	// Image is the label of files that containers share and cannot change. Empty, they
	// get none.
	Image string
	// Check returns an error for a label that is not in the policy.
	Check func(label string) error
	// Protected are paths that are never relabelled, beside those that no host
	// could do without.
	Protected []string
}

// HostConfig is the Config of this host. The error says why nothing is labelled
// although SELinux is enabled: Debian's list of labels for containers, for one, names
// types that its policy has not.
func HostConfig(protected ...string) (Config, error) {
	if !selinux.GetEnabled() {
		return Config{}, nil
	}
	//lint:ignore SA1019 nothing else tells what the policy has for containers
	process, file := selinux.ContainerLabels()
	selinux.ReleaseLabel(process) // the levels are ours to give
	//lint:ignore SA1019 likewise
	image := selinux.ROFileLabel()
	return confirmed(Config{Process: process, File: file, Image: image, Check: selinux.SecurityCheckContext, Protected: protected})
}

// confirmed is a Config whose labels are in the policy, or none.
func confirmed(c Config) (Config, error) {
	if c.Process == "" || c.File == "" {
		return Config{}, errors.New("the policy names no labels for containers: install one that does (container-selinux)")
	}
	for _, label := range []string{c.Process, c.File, c.Image} {
		if err := c.Check(label); err != nil {
			return Config{}, fmt.Errorf("the policy names the label %s for containers and does not have it: install one that does (container-selinux): %w", label, err)
		}
	}
	return c, nil
}

// SELinux is that of one host. All methods may be called at once.
type SELinux struct {
	cfg Config

	mu     sync.Mutex
	levels map[string]string // of the pods, by their id
}

// New returns the SELinux of a host.
func New(c Config) *SELinux { return &SELinux{cfg: c, levels: make(map[string]string)} }

// Enabled tells whether containers are labelled at all.
func (s *SELinux) Enabled() bool { return s.cfg.Process != "" }

// Pod returns the labels of a pod, and keeps their level for it until Release. The
// level is one that no other pod has, unless the options name one.
func (s *SELinux) Pod(id string, o Options) (Labels, error) {
	if !s.Enabled() {
		return Labels{}, nil
	}
	if o.Level == "" {
		var err error
		if o.Level, err = s.take(id); err != nil {
			return Labels{}, err
		}
	}
	l, err := s.build(o)
	if err != nil {
		s.Release(id)
		return Labels{}, err
	}
	s.Adopt(id, l)
	return l, nil
}

// Container returns the labels of a container in a pod: the pod's, with what the
// container asks for instead.
func (s *SELinux) Container(pod Labels, o Options) (Labels, error) {
	if !s.Enabled() || pod.Process == "" || o == (Options{}) {
		return pod, nil
	}
	if o.Level == "" {
		o.Level = parse(pod.Process).level
	}
	return s.build(o)
}

// Adopt keeps the level of a pod that has its labels from an earlier process.
func (s *SELinux) Adopt(id string, l Labels) {
	if level := parse(l.Process).level; level != "" {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.levels[id] = level
	}
}

// Release gives a pod's level back. It may be called any number of times.
func (s *SELinux) Release(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.levels, id)
}

const (
	categories = 1024 // that policies have
	maxTries   = 1000 // to find a free level; of half a million, few are in use
)

// take finds a level that no pod has, for a pod.
func (s *SELinux) take(id string) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	taken := make(map[string]bool, len(s.levels))
	for _, level := range s.levels {
		taken[level] = true
	}
	for range maxTries {
		a, b := rand.IntN(categories), rand.IntN(categories)
		level := fmt.Sprintf("s0:c%d,c%d", min(a, b), max(a, b))
		if a != b && !taken[level] {
			s.levels[id] = level
			return level, nil
		}
	}
	return "", fmt.Errorf("SELinux: no level is free for another pod: %w", errdefs.ErrResourceExhausted)
}

// build makes labels of the policy's, with the parts that were asked for.
func (s *SELinux) build(o Options) (Labels, error) {
	process, file := parse(s.cfg.Process), parse(s.cfg.File)
	for _, part := range []struct {
		asked string
		place *string
	}{
		{o.User, &process.user}, {o.Role, &process.role}, {o.Type, &process.kind}, {o.Level, &process.level},
		{o.User, &file.user}, {o.Level, &file.level},
	} {
		if part.asked != "" {
			*part.place = part.asked
		}
	}
	l := Labels{Process: process.String(), Mount: file.String()}
	for _, label := range []string{l.Process, l.Mount} {
		if err := s.cfg.Check(label); err != nil || strings.ContainsAny(label, "\"\\\n") {
			return Labels{}, fmt.Errorf("SELinux label %q is not in the policy of this host: %w", label, errdefs.ErrInvalidArgument)
		}
	}
	return l, nil
}

// label is one in its parts. Only a policy with levels has one.
type label struct{ user, role, kind, level string }

func parse(text string) label {
	parts := strings.SplitN(text, ":", 4)
	parts = append(parts, "", "", "", "")
	return label{parts[0], parts[1], parts[2], parts[3]}
}

func (l label) String() string {
	return strings.TrimSuffix(strings.Join([]string{l.user, l.role, l.kind, l.level}, ":"), ":")
}
