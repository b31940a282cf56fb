// Package api is what the host and the guest of the harness say to each other.
package api

// Port is the name of the virtio port that they speak over.
const Port = "sampan.test"

// The requests, and the trailer in which RunPath says how the command ended.
const (
	RunPath     = "/run"
	FilePath    = "/file"
	ExitTrailer = "Exit-Code"
)

// Command is a program for the guest to run as a systemd unit of its own.
type Command struct {
	Args       []string // the program's path and arguments
	Env        []string // NAME=VALUE
	Dir        string   // the working directory; the root if empty
	Properties []string // of the unit: NAME=VALUE
}
