package image

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// parseReference returns the full form of a reference: docker.io and library/ are
// filled in, and so is the tag latest. A tag beside a digest is dropped, as the
// digest says all.
func parseReference(ref string) (reference.Named, error) {
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return nil, fmt.Errorf("reference %q: %w: %w", ref, err, errdefs.ErrInvalidArgument)
	}
	return named, nil
}

// object returns the tag or the digest of a full reference.
func object(named reference.Named) string {
	switch n := named.(type) {
	case reference.Digested:
		return n.Digest().String()
	case reference.Tagged:
		return n.Tag()
	}
	return "latest"
}

// digestName returns how the manifest called d is named in named's repository.
func digestName(named reference.Named, d digest.Digest) string {
	return reference.TrimNamed(named).Name() + "@" + d.String()
}

// hexadecimal matches an id or the start of one. Less than six digits are too
// easily meant as something else.
var hexadecimal = regexp.MustCompile(`^[0-9a-f]{6,64}$`)

// idPrefix returns the hexadecimal digits if ref is an id or the start of one.
func idPrefix(ref string) (string, bool) {
	digits := strings.TrimPrefix(ref, "sha256:")
	return digits, hexadecimal.MatchString(digits)
}

// globs are patterns of references in which * matches anything.
type globs []*regexp.Regexp

func compileGlobs(patterns []string) (globs, error) {
	var g globs
	for _, p := range patterns {
		if !strings.Contains(p, "*") {
			named, err := parseReference(p)
			if err != nil {
				return nil, fmt.Errorf("pinned image: %w", err)
			}
			p = named.String()
		}
		g = append(g, regexp.MustCompile("^"+strings.ReplaceAll(regexp.QuoteMeta(p), `\*`, ".*")+"$"))
	}
	return g, nil
}

// match reports whether a pattern matches one of the names.
func (g globs) match(names ...[]string) bool {
	for _, list := range names {
		for _, name := range list {
			for _, re := range g {
				if re.MatchString(name) {
					return true
				}
			}
		}
	}
	return false
}
