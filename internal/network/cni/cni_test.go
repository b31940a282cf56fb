package cni

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sampan.dev/sampan/internal/network"
	"sampan.dev/sampan/internal/network/networktest"
)

// debian is where Debian's package containernetworking-plugins puts them.
const debian = "/usr/lib/cni"

const bridgeConf = `{
  "cniVersion": "1.0.0",
  "name": "lab",
  "plugins": [
    {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
     "ipam": {"type": "host-local", "dataDir": "DATA", "ranges": [[{"subnet": "10.89.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
    {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true},
    {"type": "loopback"}
  ]
}`

// bench is a lab with a configuration directory.
type bench struct {
	*networktest.Lab
	dir, confDir string
	binDirs      []string
}

func newBench(t testing.TB) *bench {
	t.Helper()
	tmp := t.TempDir()
	return &bench{
		Lab:     networktest.NewLab(t),
		dir:     filepath.Join(tmp, "network"),
		confDir: filepath.Join(tmp, "net.d"), // does not exist yet
		binDirs: []string{filepath.Join(tmp, "bin"), debian},
	}
}

func (b *bench) configure(t testing.TB, name, conf string) {
	t.Helper()
	if err := os.MkdirAll(b.confDir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(b.confDir, name), []byte(conf), 0o644); err != nil {
		t.Fatal(err)
	}
}

// configureBridge uses Debian's plugins. The test is skipped where they are not
// installed.
func (b *bench) configureBridge(t testing.TB) {
	t.Helper()
	for _, plugin := range []string{"bridge", "host-local", "portmap", "loopback"} {
		if _, err := os.Stat(filepath.Join(debian, plugin)); err != nil {
			t.Skipf("package containernetworking-plugins is not installed: %v", err)
		}
	}
	b.configure(t, "10-bridge.conflist", strings.ReplaceAll(bridgeConf, "DATA", filepath.Join(b.dir, "host-local")))
}

func (b *bench) open(t testing.TB) *Network {
	t.Helper()
	n, err := Open(Config{Dir: b.dir, ConfDir: b.confDir, BinDirs: b.binDirs, NetNS: b.Host, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n
}

func TestSuite(t *testing.T) {
	networktest.Suite(t, func(t *testing.T) networktest.Subject {
		b := newBench(t)
		b.configureBridge(t)
		return networktest.Subject{Lab: b.Lab, Open: func(t *testing.T) network.Network { return b.open(t) }}
	})
}
