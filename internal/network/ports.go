package network

import "slices"

// FirstConflict returns the first of the wanted mappings that a held one
// excludes.
func FirstConflict(wanted, held []PortMapping) (PortMapping, bool) {
	for _, w := range wanted {
		if slices.ContainsFunc(held, w.Conflicts) {
			return w, true
		}
	}
	return PortMapping{}, false
}
