// Package program is the keeper as a program: it reads the arguments and becomes
// the supervisor or the worker. Which OCI runtimes there are is the caller's.
package program

import (
	"flag"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"time"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/keeper"
	"sampan.dev/sampan/internal/keeper/supervisor"
	"sampan.dev/sampan/internal/keeper/worker"
	"sampan.dev/sampan/internal/ociruntime"
)

// Config is what a program decides about its keepers.
type Config struct {
	// Runtime returns the OCI runtime that a handler names.
	Runtime func(keeper.Handler, *slog.Logger) (ociruntime.Runtime, error)
	// IdleTimeout is how long a keeper stays that has no container and no client.
	IdleTimeout time.Duration
}

// Supervisors and workers keep little; they trade some speed of collection for it.
const (
	supervisorGC = 20
	workerGC     = 50
)

// Main runs the program with the arguments behind its name, and returns its exit
// code.
func Main(args []string, cfg Config) int {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if len(args) == 0 {
		fmt.Fprintln(os.Stderr, "sampan-keeper is started by sampan serve")
		return 2
	}
	flags := flag.NewFlagSet("sampan-keeper "+args[0], flag.ContinueOnError)
	dir := flags.String("dir", "", "the keeper's `directory`")
	cgroup := flags.String("cgroup", "", "the keeper's own `cgroup`")
	ready := flags.Int("ready", -1, "the `descriptor` to answer on")
	handover := flags.Int("handover", -1, "the `descriptor` of what a worker hands over")
	held := flags.Int("held", -1, "the `descriptor` of a list of held files")
	if err := flags.Parse(args[1:]); err != nil {
		return 2
	}
	err := host.UnignoreSignals()
	switch {
	case err != nil:
	case *dir == "":
		err = fmt.Errorf("no --dir")
	case args[0] == "supervisor":
		debug.SetGCPercent(supervisorGC)
		err = supervisor.Run(supervisor.Config{Dir: *dir, Cgroup: *cgroup, Ready: *ready, Handover: *handover, Held: *held, Log: log})
	case args[0] == "worker":
		debug.SetGCPercent(workerGC)
		err = worker.Run(worker.Config{Dir: *dir, Cgroup: *cgroup, Runtime: cfg.Runtime, IdleTimeout: cfg.IdleTimeout, Log: log})
	default:
		err = fmt.Errorf("neither supervisor nor worker: %q", args[0])
	}
	if err != nil {
		log.Error(args[0]+" ends", "pid", os.Getpid(), "err", err)
		return 1
	}
	return 0
}
