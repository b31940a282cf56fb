// Package registry fetches manifests and blobs from OCI distribution
// registries: which endpoints a repository has (hosts.toml), how to prove who
// is asking, what to retry and when to try the next endpoint.
//
// Everything it hands out by digest is verified. It stores nothing, and does
// not know what a manifest or a blob is for.
package registry

import "log/slog"

// Config says how to reach registries.
type Config struct {
	// Dir holds a directory per registry with a hosts.toml, in containerd's
	// layout. It is read anew for each repository, so that a change needs no
	// restart. Empty means none.
	Dir    string
	Logger *slog.Logger
}

// Auth carries credentials in any of the forms the CRI has. If several are
// given, the first of these wins: RegistryToken, IdentityToken, Username and
// Password, Auth.
type Auth struct {
	Username      string
	Password      string
	Auth          string // base64 of username:password
	ServerAddress string // if set, the credentials are for this registry only
	IdentityToken string // an OAuth 2 refresh token
	RegistryToken string // a bearer token, sent as it is
}
