package builtin

import (
	"crypto/sha256"
	"encoding/json"
	"sync"

	"github.com/opencontainers/runc/libcontainer/configs"
)

// maxFilters bounds the compiled profiles that are kept. A node has few: the
// default one, and those of a few workloads.
const maxFilters = 16

// filters are the profiles that were compiled. Compiling takes milliseconds.
type filters struct {
	mu       sync.Mutex
	compiled map[[sha256.Size]byte]filter
}

// of returns the filter of a profile.
func (f *filters) of(profile *configs.Seccomp) (filter, error) {
	data, err := json.Marshal(profile)
	if err != nil {
		return filter{}, err
	}
	key := sha256.Sum256(data)
	f.mu.Lock()
	defer f.mu.Unlock()
	if known, ok := f.compiled[key]; ok {
		return known, nil
	}
	flags, program, err := compileSeccomp(profile)
	if err != nil {
		return filter{}, err
	}
	if f.compiled == nil || len(f.compiled) >= maxFilters {
		f.compiled = make(map[[sha256.Size]byte]filter)
	}
	f.compiled[key] = filter{flags, program}
	return filter{flags, program}, nil
}
