package host

// ProbeFacts finds out the Facts of this machine and process.
func ProbeFacts() (Facts, error) { return Facts{}, nil }

// Devices lists the device nodes at path: the node itself, or, if path is a
// directory, all below it, symbolic links not followed.
func Devices(path string) ([]Device, error) { return nil, nil }

// AllDevices lists the devices of the host for a privileged container: all
// below /dev that no container brings along itself.
func AllDevices() ([]Device, error) { return nil, nil }
