package keeper

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/fsck"
	"sampan.dev/sampan/internal/keeper/link"
)

// Missing returns what the keeper in dir lacks of a container that has not ended;
// empty if it has all.
func Missing(dir, id string, terminal bool) string {
	want := []string{link.RequestName, link.ProcessName, link.StdoutName}
	if !terminal {
		want = append(want, link.StderrName)
	}
	for _, name := range want {
		if path := filepath.Join(dir, link.ContainersDir, id, name); !exists(path) {
			return path
		}
	}
	return ""
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// Check looks at the keepers that have a directory in dir and at the cgroups of
// keepers. Known tells of the containers, and the inits of pods, that there are.
func Check(dir, cgroups string, known func(id string) bool) ([]fsck.Problem, error) {
	traces, err := Traces(dir)
	if err != nil {
		return nil, err
	}
	var problems []fsck.Problem
	for _, t := range traces {
		for _, id := range t.Containers {
			if !known(id) {
				problems = append(problems, fsck.Problem{
					Object: "keeper " + t.Name, What: fmt.Sprintf("it has a container %s that nobody knows", id),
					Remedy: "the daemon's next start removes it",
				})
			}
		}
		if !t.Alive && len(t.Containers) == 0 {
			problems = append(problems, fsck.Problem{
				Object: "keeper " + t.Name, What: "it died and left its directory", Remedy: "the daemon's next start removes it",
				Repair: func() error { return Bury(dir, t.Name) },
			})
		}
	}
	stale, err := StaleCgroups(dir, cgroups)
	for _, path := range stale {
		problems = append(problems, fsck.Problem{
			Object: "cgroup " + path, What: "its keeper is gone", Remedy: "the daemon's next start removes it",
			Repair: func() error {
				if err := unix.Rmdir(path); err != nil && !errors.Is(err, unix.ENOENT) {
					return fmt.Errorf("remove cgroup %s: %w", path, err)
				}
				return nil
			},
		})
	}
	return problems, err
}
