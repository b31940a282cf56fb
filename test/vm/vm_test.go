package vm_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sampan.dev/sampan/test/lab"
	"sampan.dev/sampan/test/vm"
)

// limits of what a host may need for a step
const (
	buildLimit = 15 * time.Minute
	runLimit   = 40 * time.Minute
)

// everything says that all variants run, not only the short form.
func everything() bool { return os.Getenv("SAMPAN_VM") == "all" }

// suite is the image and the payload that all machines share.
type suite struct {
	image   vm.Image
	payload string
}

func prepare(t *testing.T, packages ...string) suite {
	t.Helper()
	if os.Getenv(lab.Binary) == "" {
		t.Skipf("%s is not set: `make test` builds the daemon and runs this", lab.Binary)
	}
	ctx, cancel := context.WithTimeout(t.Context(), buildLimit)
	defer cancel()
	switch err := vm.Probe(ctx); {
	case errors.Is(err, exec.ErrNotFound):
		t.Fatalf("%v: install qemu-system-x86", err)
	case err != nil:
		t.Skip("this host cannot emulate another: ", err)
	}
	if err := lab.Prepare(ctx); err != nil {
		t.Fatal(err)
	}
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	s := suite{payload: filepath.Join(t.TempDir(), "payload.ext4")}.on(t, vm.Plain)
	begin := time.Now()
	if err := vm.Payload(ctx, root, s.payload, packages...); err != nil {
		t.Fatal(err)
	}
	fmt.Printf("vm: payload in %v\n", time.Since(begin).Round(time.Second))
	return s
}

// on is the same with machines of another image.
func (s suite) on(t *testing.T, r vm.Recipe) suite {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), buildLimit)
	defer cancel()
	begin := time.Now()
	image, err := vm.Build(ctx, "../../.cache", r)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Printf("vm: image in %v\n", time.Since(begin).Round(time.Second))
	s.image = image
	return s
}

// boot starts a machine that ends with the test.
func (s suite) boot(t *testing.T, o vm.Options) *vm.VM {
	t.Helper()
	o.Disks = append([]vm.Disk{{Path: s.payload, Mount: vm.PayloadDir, ReadOnly: true}}, o.Disks...)
	begin := time.Now()
	m, err := s.image.Boot(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the end of the machine's console:\n%s", m.Console())
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	fmt.Printf("vm: boot %s in %v\n", strings.Join(append([]string{"kernel " + o.Kernel}, o.Append...), " "), time.Since(begin).Round(time.Second))
	return m
}

// runTests runs compiled tests of a package in the machine.
func runTests(t *testing.T, m *vm.VM, pkg string, env []string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), runLimit)
	defer cancel()
	begin := time.Now()
	code, err := m.Run(ctx, testCommand(pkg, env, args...), os.Stdout)
	fmt.Printf("vm: %s %s in %v\n", pkg, strings.Join(args, " "), time.Since(begin).Round(time.Second))
	if err != nil || code != 0 {
		t.Errorf("%s in the machine: exit code %d, %v", pkg, code, err)
	}
}

// testCommand runs compiled tests of a package.
func testCommand(pkg string, env []string, args ...string) vm.Command {
	program, dir := vm.Tests(pkg)
	return vm.Command{
		Args: append([]string{program, "-test.v", "-test.timeout=" + runLimit.String()}, args...), Dir: dir,
		Env: append([]string{
			"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root",
			lab.Binary + "=" + vm.PayloadDir + "/bin/sampan", lab.Images + "=" + vm.ImagesDir(),
		}, env...),
	}
}

const onNode = lab.Node + "=1"

// TestShort is what takes minutes: a pod's life, kills for want of
// memory and AppArmor, with systemd on cgroup v2.
func TestShort(t *testing.T) {
	if everything() {
		t.Skip("TestNode runs all of it")
	}
	s := prepare(t, "./test/node", "./test/conformance")
	m := s.boot(t, vm.Options{})
	runTests(t, m, "./test/node", []string{onNode}, "-test.short", "-test.run=^(TestPlaces|TestRestart|TestOOM)$")
	runTests(t, m, "./test/conformance", []string{onNode, "SAMPAN_CONFORMANCE_FOCUS=AppArmor"}, "-test.run=^TestBuiltin$")
}

// job is a run of a package's compiled tests in a machine.
type job struct {
	pkg, tests string
	env        []string
}

// The jobs. On a node the daemon is a unit of systemd, in a lab of namespaces it makes
// cgroups itself.
var (
	nodeTests = job{"./test/node", ".", []string{onNode}}
	critest   = job{"./test/conformance", "^TestBuiltin$", []string{onNode, "SAMPAN_CONFORMANCE=all"}}
	otherOCI  = job{"./test/conformance", "^(TestRunc|TestCrun)$", []string{onNode}}
	userNS    = job{"./test/e2e", "^TestUserNamespace", nil}
	inLab     = job{"./test/e2e", "^(TestKill|TestRestart|TestStats|TestReset|TestCNI|TestIsolation|TestCrictl|TestHandlerFeatures|TestUserNamespace|TestFsck)$", nil}
	crashes   = job{"./test/crash", "^(TestPoints|TestOOM|TestRandom|TestReboot)$", []string{lab.Binary + "=" + vm.PayloadDir + "/bin/faultpoints/sampan"}}
	units     = []job{{"./internal/host", ".", nil}, {"./internal/layer", ".", nil}, {"./internal/stats", ".", nil}}
)

// withCgroupfs is the job with a daemon that does not ask systemd.
func (j job) withCgroupfs() job {
	j.env = append(slices.Clone(j.env), "SAMPAN_TEST_NODE_CONFIG=[cgroup]\ndriver = \"cgroupfs\"")
	return j
}

// TestNode is everything, on each kind of host.
func TestNode(t *testing.T) {
	if !everything() {
		t.Skip("SAMPAN_VM is not all: make test-vm")
	}
	s := prepare(t, "./test/node", "./test/conformance", "./test/e2e", "./test/crash", "./internal/host", "./internal/layer", "./internal/stats")
	legacy := "systemd.unified_cgroup_hierarchy=0"
	for _, host := range []struct {
		name   string
		recipe vm.Recipe
		kernel string
		words  []string // of the kernel's command line
		jobs   []job
	}{
		{"v2", vm.Plain, "", nil, append([]job{nodeTests, critest, otherOCI}, units...)},
		{"v2-6.12", vm.Plain, "6.12", nil, append([]job{nodeTests, critest, userNS}, units...)},
		{"v2-cgroupfs", vm.Plain, "", nil, []job{nodeTests.withCgroupfs(), critest.withCgroupfs()}},
		{"v2-lab", vm.Plain, "", nil, []job{inLab, crashes}},
		{"selinux", vm.SELinux, "", vm.SELinuxWords, []job{nodeTests}},
		{"hybrid", vm.Plain, "", []string{legacy}, append([]job{nodeTests, critest}, units...)},
		{"v1", vm.Plain, "", []string{legacy, "systemd.legacy_systemd_cgroup_controller=1"}, append([]job{nodeTests, critest}, units...)},
	} {
		t.Run(host.name, func(t *testing.T) {
			m := s.on(t, host.recipe).boot(t, vm.Options{Kernel: host.kernel, Append: host.words})
			for _, j := range host.jobs {
				runTests(t, m, j.pkg, j.env, "-test.run="+j.tests)
			}
		})
	}
}
