package node

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/state"
	"sampan.dev/sampan/test/lab"
)

var (
	powerDisk = flag.String("power.disk", "", "the directory that outlives the machine, with the daemon's ROOT in it")
	powerSeed = flag.Uint64("power.seed", 1, "of what the machine does until its power fails")
	powerLast = flag.Bool("power.last", false, "look at what the last power failure has left, and end")
)

const (
	// keptImage is pulled once, and on the disk before the first failure: it must
	// be there, as it was, after each.
	keptImage = "registry.k8s.io/pause:3.9"

	// powerBound is how long the host may take to cut the power, or the daemon to
	// have everything in order again.
	powerBound = 5 * time.Minute
)

// otherImages come and go.
var otherImages = []string{
	"docker.io/library/busybox:latest", "docker.io/library/nginx:latest", "registry.k8s.io/e2e-test-images/httpd:2.4.39-4",
	"gcr.io/k8s-staging-cri-tools/test-image-predefined-group:latest", "quay.io/sampan/variants:oci-zstd", "quay.io/sampan/lines:latest",
}

// TestPowerLoss is one life of a machine whose power will fail: it looks at what
// the last failure has left on the disk, and then has the daemon pull, run and
// remove until the end. test/vm makes the disk and cuts the power.
func TestPowerLoss(t *testing.T) {
	lab.RequireNode(t)
	if *powerDisk == "" {
		t.Skip("-power.disk is not set: TestPowerLoss of test/vm runs this")
	}
	p := &powered{Lab: lab.New(t, lab.Options{Root: filepath.Join(*powerDisk, "root")}), file: filepath.Join(*powerDisk, "reference")}
	if _, err := os.Stat(p.file); errors.Is(err, fs.ErrNotExist) {
		p.first(t)
	} else {
		p.afterwards(t)
	}
	if !*powerLast && !t.Failed() {
		p.work(t)
	}
}

// powered is a lab on a disk that outlives it.
type powered struct {
	*lab.Lab
	file      string    // where the reference is
	reference reference // what layers are like
}

// reference is what each layer was like when it was unpacked, and where the kept
// image's are.
type reference struct {
	Layers map[digest.Digest][]string
	Kept   map[digest.Digest]uint64 // inode
}

// first pulls every image and writes down what its layers are like.
func (p *powered) first(t *testing.T) {
	t.Helper()
	r := reference{Layers: map[digest.Digest][]string{}, Kept: map[digest.Digest]uint64{}}
	p.Pull(t, keptImage)
	for id, dir := range p.layers(t) {
		r.Kept[id] = inode(t, dir)
	}
	for _, image := range otherImages {
		p.Pull(t, image)
	}
	for id, dir := range p.layers(t) {
		r.Layers[id] = describe(t, dir)
	}
	text, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p.file+".new", text, 0o600); err != nil {
		t.Fatal(err)
	}
	unix.Sync() // and with it the layers; the daemon may take its time to write so
	for end := time.Now().Add(powerBound); len(p.unsynced(t)) > 0; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not known to be on the disk: %v", p.unsynced(t))
		}
	}
	if err := os.Rename(p.file+".new", p.file); err != nil {
		t.Fatal(err)
	}
	unix.Sync()
	p.reference = r
	fmt.Printf("power: %d layers, %d files\n", len(r.Layers), count(r.Layers))
}

func count(layers map[digest.Digest][]string) (n int) {
	for _, files := range layers {
		n += len(files)
	}
	return n
}

// layerRecord is what docs/STATE.md says of layers/record.
type layerRecord struct {
	DiffID digest.Digest
	Boot   string
	Synced bool
}

func (p *powered) records(t *testing.T) map[string]layerRecord {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(p.Root, "layers/record/*"))
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]layerRecord{}
	for _, file := range files {
		var r layerRecord
		err := state.Read(file, state.Kind{Name: "layer", Version: 1}, &r)
		if errors.Is(err, fs.ErrNotExist) {
			continue // it goes just now
		}
		if err != nil {
			t.Fatal(err)
		}
		all[filepath.Base(file)] = r
	}
	return all
}

// layers are the directories of all layers that the daemon trusts.
func (p *powered) layers(t *testing.T) map[digest.Digest]string {
	t.Helper()
	dirs := map[digest.Digest]string{}
	for name, r := range p.records(t) {
		if !r.Synced && r.Boot != host.BootID() {
			t.Errorf("layer %s: kept, though it is of an earlier boot and was not on the disk", r.DiffID)
		}
		dirs[r.DiffID] = filepath.Join(p.Root, "layers/tree", name)
	}
	return dirs
}

func (p *powered) unsynced(t *testing.T) (ids []digest.Digest) {
	t.Helper()
	for _, r := range p.records(t) {
		if !r.Synced {
			ids = append(ids, r.DiffID)
		}
	}
	return ids
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Ino
}

// describe tells everything about each file below dir, one a line. Directories
// that a layer only implies have the time of their making, so theirs is left out.
func describe(t *testing.T, dir string) []string {
	t.Helper()
	var lines []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		line := fmt.Sprintf("%q %v %d:%d", strings.TrimPrefix(path, dir), info.Mode(), st.Uid, st.Gid)
		if !info.IsDir() {
			line += fmt.Sprintf(" links=%d device=%d time=%d.%09d", st.Nlink, st.Rdev, st.Mtim.Sec, st.Mtim.Nsec)
		}
		if info.Mode().Type() == fs.ModeSymlink {
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" to=%q", target)
		}
		if info.Mode().IsRegular() {
			sum, err := sumOf(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" size=%d sha256=%s", info.Size(), sum)
		}
		xattrs, err := xattrsOf(path)
		lines = append(lines, line+xattrs)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

func sumOf(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	_, err = io.Copy(h, f)
	return fmt.Sprintf("%x", h.Sum(nil)), err
}

func xattrsOf(path string) (string, error) {
	names, value := make([]byte, 4096), make([]byte, 4096)
	n, err := unix.Llistxattr(path, names)
	if err != nil {
		return "", err
	}
	text := ""
	for name := range strings.SplitSeq(strings.TrimRight(string(names[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return "", err
		}
		text += fmt.Sprintf(" %s=%x", name, value[:n])
	}
	return text, nil
}

// afterwards looks at what a power failure has left: what is trusted is whole,
// everything else is in order, or says what is wrong, and a kubelet can go on.
func (p *powered) afterwards(t *testing.T) {
	t.Helper()
	text, err := os.ReadFile(p.file)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &p.reference); err != nil {
		t.Fatal(err)
	}
	p.compareLayers(t)
	p.checkKept(t)
	p.checkPods(t)
	p.awaitFsck(t, "after the power failure", damaged)
	p.compareLayers(t) // with those that were fetched again
	p.checkImages(t)
	p.nextAttempt(t)
	p.removePods(t)
	p.awaitFsck(t, "when the pods are removed", nil)
	p.awaitEmpty(t)
	p.goesOn(t)
}

// compareLayers compares each file of each layer with what it was.
func (p *powered) compareLayers(t *testing.T) {
	t.Helper()
	layers := p.layers(t)
	for id, dir := range layers {
		want, ok := p.reference.Layers[id]
		if !ok {
			t.Errorf("layer %s: no image has it", id)
			continue
		}
		if got := describe(t, dir); !slices.Equal(got, want) {
			t.Errorf("layer %s is broken: %s", id, difference(got, want))
		}
	}
	fmt.Printf("power: %d layers are as they were\n", len(layers))
}

// difference is the first of two lists' differences.
func difference(got, want []string) string {
	for i := range min(len(got), len(want)) {
		if got[i] != want[i] {
			return fmt.Sprintf("it has\n%s\nand should have\n%s", got[i], want[i])
		}
	}
	return fmt.Sprintf("it has %d files, and should have %d", len(got), len(want))
}

// checkKept: what was on the disk long ago is not fetched again.
func (p *powered) checkKept(t *testing.T) {
	t.Helper()
	r, err := p.Images.ImageStatus(t.Context(), &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: keptImage}})
	if err != nil || r.GetImage() == nil {
		t.Errorf("%s is gone: %v", keptImage, err)
	}
	layers := p.layers(t)
	for id, was := range p.reference.Kept {
		if now := inode(t, layers[id]); now != was {
			t.Errorf("layer %s of %s was fetched again", id, keptImage)
		}
	}
}

// checkImages: every image that is listed has all its layers, and can be pulled
// again, which fetches nothing.
func (p *powered) checkImages(t *testing.T) {
	t.Helper()
	before := p.layers(t)
	r, err := p.Images.ListImages(t.Context(), &runtimeapi.ListImagesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, image := range r.GetImages() {
		for _, name := range image.GetRepoDigests() {
			if id := p.Pull(t, name); id != image.GetId() {
				t.Errorf("%s is the image %s, it was %s", name, id, image.GetId())
			}
		}
	}
	if now := p.layers(t); !maps.Equal(now, before) {
		t.Errorf("images lacked layers: there were %v, with them pulled again %v", before, now)
	}
	fmt.Printf("power: %d images are whole\n", len(r.GetImages()))
}

// checkPods: nothing runs, and each container says how it has ended.
func (p *powered) checkPods(t *testing.T) {
	t.Helper()
	pods, err := p.Runtime.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}
	unreadable := 0
	for _, pod := range pods.GetItems() {
		if pod.GetState() != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
			t.Errorf("pod %s is %v", pod.GetMetadata().GetName(), pod.GetState())
		}
		if strings.HasPrefix(pod.GetMetadata().GetName(), "unreadable-") {
			unreadable++
		}
	}
	list, err := p.Runtime.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range list.GetContainers() {
		s := p.Status(t, c.GetId())
		if s.GetState() != runtimeapi.ContainerState_CONTAINER_EXITED || s.GetReason() == "" || s.GetExitCode() == 255 && s.GetMessage() == "" {
			t.Errorf("container %s is %v, code %d, %q, %q", c.GetId(), s.GetState(), s.GetExitCode(), s.GetReason(), s.GetMessage())
		}
	}
	fmt.Printf("power: %d pods, %d of them unreadable, %d containers\n", len(pods.GetItems()), unreadable, len(list.GetContainers()))
}

// damaged tells of a problem that it is a record that was not on the disk yet: it
// goes with its pod or container.
func damaged(problem, remedy string) bool {
	return remedy == "remove the pod" || remedy == "remove the container"
}

// awaitFsck waits until `sampan fsck --content` finds nothing but what may be.
func (p *powered) awaitFsck(t *testing.T, when string, may func(problem, remedy string) bool) {
	t.Helper()
	for end := time.Now().Add(powerBound); ; time.Sleep(time.Second) {
		out, code := p.Fsck("--content")
		left, known := problems(out)
		if may != nil {
			left = slices.DeleteFunc(left, func(problem string) bool { return may(problem, known[problem]) })
		}
		switch {
		case len(left) == 0 && code <= 1:
			return
		case code > 1 || time.Now().After(end):
			t.Fatalf("fsck %s: %d\n%s", when, code, out)
		}
	}
}

// problems are what fsck has printed, and the remedies of them.
func problems(out string) (list []string, remedies map[string]string) {
	remedies = map[string]string{}
	for line := range strings.Lines(out) {
		line = strings.TrimRight(line, "\n")
		switch text, indented := strings.CutPrefix(line, "    "); {
		case indented && len(list) > 0:
			remedies[list[len(list)-1]] = text
		case !strings.HasPrefix(line, "sampan: fsck: "):
			list = append(list, line)
		}
	}
	return list, remedies
}

// nextAttempt: the kubelet makes a pod anew before it removes the one that was.
func (p *powered) nextAttempt(t *testing.T) {
	t.Helper()
	pods, err := p.Runtime.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, pod := range pods.GetItems() {
		m := pod.GetMetadata()
		if m.GetNamespace() != "lab" {
			continue // unreadable
		}
		config := p.PodConfig(m.GetName())
		config.Metadata.Attempt = m.GetAttempt() + 1
		p.runs(t, config)
		return
	}
}

// removePods does as the kubelet does with pods of which it does not know.
func (p *powered) removePods(t *testing.T) {
	t.Helper()
	pods, err := p.Runtime.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, pod := range pods.GetItems() {
		p.RemovePod(t, pod.GetId())
	}
}

// awaitEmpty: nothing of what was half made, or half removed, stays.
func (p *powered) awaitEmpty(t *testing.T) {
	t.Helper()
	for end := time.Now().Add(powerBound); ; time.Sleep(200 * time.Millisecond) {
		var left []string
		var err error
		for _, dir := range []string{"pods", "containers", "checkpoints", "trash", "layers/tmp", "images/tmp"} {
			files, globErr := filepath.Glob(filepath.Join(p.Root, dir, "*"))
			left, err = append(left, files...), errors.Join(err, globErr)
		}
		switch {
		case err != nil:
			t.Fatal(err)
		case len(left) == 0:
			return
		case time.Now().After(end):
			t.Fatalf("there is left: %v", left)
		}
	}
}

// goesOn: images can be pulled and pods run, with a name and an address that may
// have been others' before.
func (p *powered) goesOn(t *testing.T) {
	t.Helper()
	for _, image := range otherImages {
		p.Pull(t, image)
	}
	p.compareLayers(t)
	config := p.PodConfig("w0-0")
	config.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 80, HostPort: powerPort}}
	p.RemovePod(t, p.runs(t, config))
}

// runs makes a pod and runs something in it.
func (p *powered) runs(t *testing.T, config *runtimeapi.PodSandboxConfig) string {
	t.Helper()
	image := p.Pull(t, busybox)
	pod := p.RunPod(t, config)
	id := p.CreateContainer(t, pod, config, p.ContainerConfig("box", image, "sleep", "1000"))
	p.StartContainer(t, id)
	if out := p.ExecSync(t, id, "hostname"); string(out.GetStdout()) != config.Hostname+"\n" {
		t.Errorf("exec: %v", out)
	}
	r, err := p.Runtime.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod})
	if err != nil || r.GetStatus().GetNetwork().GetIp() == "" {
		t.Errorf("pod %s has no address: %v, %v", config.GetMetadata().GetName(), r.GetStatus(), err)
	}
	return pod
}

// powerPort is the host's port of the first worker's pods.
const powerPort = 18088

// work pulls, runs and removes at random until the power fails.
func (p *powered) work(t *testing.T) {
	t.Helper()
	fmt.Println(lab.PowerOn)
	end := time.Now().Add(powerBound)
	var workers sync.WaitGroup
	for n, do := range []func(*testing.T, *rand.Rand, int){p.disk, p.pullOne, p.pullOne, p.runOne, p.runOne} {
		rng := rand.New(rand.NewPCG(*powerSeed, uint64(n)))
		workers.Go(func() {
			for i := 0; !t.Failed() && time.Now().Before(end); i++ {
				do(t, rng, n*1000+i)
			}
		})
	}
	workers.Wait()
	t.Error("the power did not fail")
}

// disk has names written to the disk now and then, as others' fsyncs do, and so
// perhaps before the content of the files that they are of.
func (p *powered) disk(t *testing.T, rng *rand.Rand, _ int) {
	time.Sleep(time.Duration(rng.IntN(2000)) * time.Millisecond)
	f, err := os.Create(filepath.Join(*powerDisk, "others"))
	if err != nil {
		t.Error(err)
		return
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		t.Error(err)
	}
}

// pullOne pulls an image, or removes it.
func (p *powered) pullOne(t *testing.T, rng *rand.Rand, _ int) {
	image := &runtimeapi.ImageSpec{Image: otherImages[rng.IntN(len(otherImages))]}
	if rng.IntN(2) == 0 {
		_, err := p.Images.RemoveImage(t.Context(), &runtimeapi.RemoveImageRequest{Image: image})
		report(t, "remove image", err)
		return
	}
	_, err := p.Images.PullImage(t.Context(), &runtimeapi.PullImageRequest{Image: image})
	report(t, "pull", err)
}

// runOne runs a pod with a container that writes, and removes it, or not.
func (p *powered) runOne(t *testing.T, rng *rand.Rand, n int) {
	r, err := p.Images.PullImage(t.Context(), &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: busybox}})
	report(t, "pull", err)
	config := p.PodConfig(fmt.Sprintf("w%d", n))
	pod, err := p.Runtime.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: config})
	report(t, "run pod", err)
	if err != nil {
		return
	}
	script := fmt.Sprintf("head -c %d /dev/zero >/file; echo written; sleep %d; exit 3", rng.IntN(1<<20), rng.IntN(2)*1000)
	c, err := p.Runtime.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{
		PodSandboxId: pod.GetPodSandboxId(), SandboxConfig: config, Config: p.ContainerConfig("box", r.GetImageRef(), "sh", "-c", script),
	})
	report(t, "create container", err)
	if err == nil {
		_, err = p.Runtime.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: c.GetContainerId()})
		report(t, "start container", err)
	}
	if rng.IntN(3) == 0 {
		return // it is there when the power fails
	}
	_, err = p.Runtime.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod.GetPodSandboxId()})
	report(t, "stop pod", err)
	_, err = p.Runtime.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod.GetPodSandboxId()})
	report(t, "remove pod", err)
}

// report fails the test for an error; that somebody has just removed the image is none.
func report(t *testing.T, op string, err error) {
	if err != nil && status.Code(err) != codes.NotFound {
		t.Errorf("%s: %v", op, err)
	}
}
