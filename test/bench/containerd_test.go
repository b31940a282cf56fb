package bench

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"sampan.dev/sampan/test/images"
	"sampan.dev/sampan/test/lab"
)

// containerd is Debian's, with its own root, state and network, in the lab.
type containerd struct {
	socket  string
	command string // that starts it
}

const containerdConfig = `version = 2
root = %[1]q
state = %[2]q
[grpc]
address = %[3]q
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "registry.k8s.io/pause:3.9"
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = %[4]q
[plugins."io.containerd.grpc.v1.cri".registry]
config_path = %[5]q
[plugins."io.containerd.grpc.v1.cri".containerd]
default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.crun]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.crun.options]
BinaryName = "/usr/bin/crun"
`

const networkConfig = `{
  "cniVersion": "1.0.0", "name": "bench",
  "plugins": [
    {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
     "ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": "10.89.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
`

// startContainerd unpacks Debian's containerd and runs it until the test ends.
func startContainerd(t *testing.T, l *lab.Lab) containerd {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	cache, err := lab.Cache()
	must(err)
	bin := filepath.Join(l.Dir, "containerd-bin")
	must(images.Unpack(t.Context(), cache, "containerd", bin))
	dir, state := filepath.Join(l.Dir, "containerd"), "/run/containerd-bench"
	conf := filepath.Join(dir, "net.d")
	must(os.MkdirAll(conf, 0o755))
	c := containerd{socket: filepath.Join(state, "containerd.sock")}
	must(os.WriteFile(filepath.Join(conf, "10-bench.conflist"), fmt.Appendf(nil, networkConfig, filepath.Join(dir, "ipam")), 0o644))
	config := filepath.Join(dir, "config.toml")
	must(os.WriteFile(config, fmt.Appendf(nil, containerdConfig, filepath.Join(dir, "root"), state, c.socket, conf, l.Hosts), 0o644))
	c.command = fmt.Sprintf("PATH=%s:$PATH exec %s --config %s >>%s 2>&1",
		filepath.Join(bin, "usr/bin"), filepath.Join(bin, "usr/bin/containerd"), config, filepath.Join(dir, "log"))
	cmd := exec.Command("/bin/sh", "-c", c.command)
	cmd.Env = l.Env()
	must(cmd.Start())
	go cmd.Wait() //nolint:errcheck // it is killed by the benchmark, or ends with the lab
	must(awaitSocket(t.Context(), c.socket))
	return c
}

func awaitSocket(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for {
		conn, err := net.Dial("unix", path)
		if err == nil {
			return conn.Close()
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(50 * time.Millisecond):
		}
	}
}
