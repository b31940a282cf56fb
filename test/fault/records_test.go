package fault

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/lab"
)

// TestDamagedRecords damages every record there is of a pod, a container and an
// image, one after the other, while the daemon is down. It starts all the same,
// whatever else there was is still there, and what the record was of can be
// removed.
func TestDamagedRecords(t *testing.T) {
	l := lab.New(t, lab.Options{})
	image := l.Pull(t, "busybox")
	bystander := l.PodConfig("bystander")
	other := l.RunPod(t, bystander)
	steady := l.CreateContainer(t, other, bystander, l.ContainerConfig("steady", image, "sleep", "1000"))
	l.StartContainer(t, steady)
	name := names("damaged-")

	kinds := map[string]bool{}
	for tries := 0; ; tries++ {
		if tries > 60 {
			t.Fatal("it does not end")
		}
		config := l.PodConfig(name())
		pod := l.RunPod(t, config)
		c := l.ContainerConfig("c", image, "sleep", "1000")
		id := l.CreateContainer(t, pod, config, c)
		l.StartContainer(t, id)
		var victim string
		for _, path := range records(t, l) {
			if kind := kindOf(path, pod, id); !kinds[kind] && !strings.Contains(path, steady) && !strings.Contains(path, other) {
				victim = path
				kinds[kind] = true
				break
			}
		}
		if victim == "" {
			l.RemovePod(t, pod)
			break
		}
		t.Run(strings.ReplaceAll(kindOf(victim, pod, id), "/", "_"), func(t *testing.T) {
			l.Kill(t)
			damage(t, victim, tries)
			l.Start(t)
			awaitRunning(t, l, steady)
			ctx := brief(t)
			pods, err := l.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
			must(t, err)
			for _, p := range pods.GetItems() {
				if p.GetId() != other {
					l.RemovePod(t, p.GetId())
				}
			}
			if containers, err := l.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{}); err != nil || len(containers.GetContainers()) != 1 {
				t.Errorf("containers afterwards: %v, %v", containers, err)
			}
			if again := l.Pull(t, "busybox"); again != image {
				t.Errorf("pulled again, the image is %s, was %s", again, image)
			}
			checkOthers(t, l, image, name())
		})
	}
	t.Logf("%d kinds of record damaged", len(kinds))
	if len(kinds) < 6 {
		t.Errorf("only %v", kinds)
	}
}

// damage spoils a file, in one of several ways.
func damage(t *testing.T, path string, how int) {
	t.Helper()
	info, err := os.Stat(path)
	must(t, err)
	text, err := os.ReadFile(path)
	must(t, err)
	switch how % 4 {
	case 0:
		text = nil
	case 1:
		text = text[:len(text)/2]
	case 2:
		text[len(text)/2] ^= 1
	case 3:
		text = []byte(strings.Repeat("\x00", len(text)))
	}
	t.Logf("%s: damage %d", path, how%4)
	must(t, os.WriteFile(path, text, info.Mode().Perm()))
}

// records are the files in ROOT and STATE that begin as records do.
func records(t *testing.T, l *lab.Lab) []string {
	t.Helper()
	var found []string
	for _, dir := range []string{l.Root, l.State} {
		must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			switch {
			case err != nil:
				return nil // gone meanwhile
			case d.IsDir() && (d.Name() == "tree" || d.Name() == "rootfs" || d.Name() == "ns" || d.Name() == "bundle"):
				return fs.SkipDir
			case d.Type().IsRegular():
				if text, err := os.ReadFile(path); err == nil && strings.HasPrefix(string(text), "sampan ") {
					found = append(found, path)
				}
			}
			return nil
		}))
	}
	return found
}

// kindOf is a record's path without what is its own.
func kindOf(path, pod, container string) string {
	for _, own := range []string{pod, container} {
		path = strings.ReplaceAll(path, own, "ID")
	}
	parts := strings.Split(path, "/")
	for i, p := range parts {
		if len(p) > 16 && strings.Trim(p, "0123456789abcdef") == "" {
			parts[i] = "ID"
		}
	}
	return strings.Join(parts[max(0, len(parts)-3):], "/")
}

// awaitRunning waits until the daemon has taken over a container.
func awaitRunning(t *testing.T, l *lab.Lab, id string) {
	t.Helper()
	var last string
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		r, err := l.Runtime.ContainerStatus(brief(t), &runtimeapi.ContainerStatusRequest{ContainerId: id})
		if err == nil && r.GetStatus().GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING {
			return
		}
		last = fmt.Sprint(r.GetStatus().GetState(), err)
	}
	t.Fatalf("container %s is not running: %s", id, last)
}
