package registry

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/containerd/errdefs"
)

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

// secret returns a user name and password. A secret without a user name is an
// OAuth 2 refresh token.
func (a *Auth) secret() (username, secret string, err error) {
	switch {
	case a == nil:
		return "", "", nil
	case a.IdentityToken != "":
		return "", a.IdentityToken, nil
	case a.Username != "":
		return a.Username, a.Password, nil
	case a.Auth == "":
		return "", "", nil
	}
	plain, err := base64.StdEncoding.DecodeString(a.Auth)
	if err != nil {
		// Not the decoder's error: it would show where in the secret it stopped.
		return "", "", fmt.Errorf("credentials: auth is not base64: %w", errdefs.ErrInvalidArgument)
	}
	username, secret, ok := strings.Cut(string(plain), ":")
	if !ok {
		return "", "", fmt.Errorf("credentials: auth is not username:password in base64: %w", errdefs.ErrInvalidArgument)
	}
	return username, strings.Trim(secret, "\x00"), nil
}

// coversHost reports whether the credentials may be shown to an endpoint. Without
// a ServerAddress they are for every endpoint that hosts.toml gives the
// repository: who administers the node chose those.
func (a *Auth) coversHost(host string) bool {
	return a.ServerAddress == "" || canonicalHost(a.ServerAddress) == canonicalHost(host)
}

// canonicalHost returns the host of an address with or without scheme and path,
// and one name for all that Docker Hub is called.
func canonicalHost(address string) string {
	if !strings.Contains(address, "://") {
		address = "https://" + address
	}
	u, err := url.Parse(address)
	if err != nil {
		return address
	}
	switch u.Host {
	case "index.docker.io", "registry-1.docker.io":
		return "docker.io"
	}
	return strings.ToLower(u.Host)
}

// tokenAuthorizer sends one token to the hosts it is for.
type tokenAuthorizer struct {
	token string
	hosts map[string]bool
}

func (a tokenAuthorizer) Authorize(_ context.Context, req *http.Request) error {
	if a.hosts[req.URL.Host] {
		req.Header.Set("Authorization", "Bearer "+a.token)
	}
	return nil
}

// AddResponses knows no other way when the token is refused.
func (a tokenAuthorizer) AddResponses(context.Context, []*http.Response) error {
	return errdefs.ErrNotImplemented
}
