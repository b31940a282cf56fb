package criu

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"google.golang.org/protobuf/encoding/protowire"
)

// The images that DetachStdio changes.
const (
	filesName       = "files.img"        // CRIU's, of all open files
	fifoDataName    = "fifo-data.img"    // CRIU's, of what is in FIFOs
	descriptorsName = "descriptors.json" // the OCI runtime's, of the first process' stdio
)

// pipeNames are the names that DetachStdio gives, by descriptor. An OCI runtime
// has CRIU put the new container's stdio in the place of what is called a pipe.
var pipeNames = [3]string{"pipe:[stdin]", "pipe:[stdout]", "pipe:[stderr]"}

// DetachStdio makes pipes of the files from outside in a dump, as far as names go,
// so that every OCI runtime that knows how to restore a container whose stdio
// was pipes can restore this one. What was on its way in them belongs to the
// container that was dumped, in whose log it ends, and is left out.
func DetachStdio(images string, stdio Stdio) error {
	if len(stdio) == 0 {
		return nil
	}
	names := make(map[string]string) // CRIU's name of a file to the new one
	for fd, name := range pipeNames {
		if file := stdio[fd]; file != "" && names[file] == "" {
			names[file] = name
		}
	}
	var descriptors [3]string
	for fd, file := range stdio {
		descriptors[fd] = names[file]
	}
	if err := renameFiles(filepath.Join(images, filesName), names); err != nil {
		return err
	}
	if err := dropData(filepath.Join(images, fifoDataName), stdio); err != nil {
		return err
	}
	data, err := json.Marshal(descriptors)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(images, descriptorsName), data, 0o600)
}

// An image is two magic numbers, and entries: the length as 32 bits, little
// endian, and a protobuf message.
const imageHeader = 8

// The fields of CRIU's messages that matter.
const (
	fieldRegular protowire.Number = 3 // of file_entry: a reg_file_entry
	fieldName    protowire.Number = 6 // of reg_file_entry
	fieldPipe    protowire.Number = 1 // of pipe_data_entry: the inode
	fieldBytes   protowire.Number = 2 // of pipe_data_entry
)

var errImage = errors.New("is not as CRIU writes it")

// next returns the first entry of an image without its header, and what follows.
func next(image []byte) (entry, rest []byte, err error) {
	if len(image) < 4 || uint64(len(image)-4) < uint64(binary.LittleEndian.Uint32(image)) {
		return nil, nil, errImage
	}
	end := 4 + binary.LittleEndian.Uint32(image)
	return image[4:end], image[end:], nil
}

func appendEntry(image, entry []byte) []byte {
	return append(binary.LittleEndian.AppendUint32(image, uint32(len(entry))), entry...)
}

// rewrite replaces an image by what change makes of all behind its header.
func rewrite(path string, change func(out, entries []byte) ([]byte, error)) error {
	image, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if len(image) < imageHeader {
		return fmt.Errorf("%s %w", path, errImage)
	}
	out, err := change(image[:imageHeader:imageHeader], image[imageHeader:])
	if err != nil {
		return fmt.Errorf("%s %w", path, err)
	}
	return os.WriteFile(path, out, 0o600)
}

// renameFiles changes the names of open files.
func renameFiles(path string, names map[string]string) error {
	return rewrite(path, func(out, entries []byte) ([]byte, error) {
		for len(entries) > 0 {
			entry, rest, err := next(entries)
			if err != nil {
				return nil, err
			}
			if entry, err = renameEntry(entry, names); err != nil {
				return nil, err
			}
			out, entries = appendEntry(out, entry), rest
		}
		return out, nil
	})
}

// dropData empties FIFOs. Each entry is a pipe_data_entry, with the FIFO's inode
// and the length of the data, which follow it.
func dropData(path string, stdio Stdio) error {
	drop := make(map[uint32]bool)
	for _, file := range stdio {
		var mount, inode uint64
		if _, err := fmt.Sscanf(file, fileFormat, &mount, &inode); err != nil {
			return fmt.Errorf("file %q: %w", file, err)
		}
		drop[uint32(inode)] = true
	}
	err := rewrite(path, func(out, entries []byte) ([]byte, error) {
		for len(entries) > 0 {
			entry, rest, err := next(entries)
			if err != nil {
				return nil, err
			}
			size := number(entry, fieldBytes)
			if size > uint64(len(rest)) {
				return nil, errImage
			}
			data := rest[:size]
			if drop[uint32(number(entry, fieldPipe))] {
				entry = protowire.AppendVarint(protowire.AppendTag(entry[:len(entry):len(entry)], fieldBytes, protowire.VarintType), 0)
				data = nil
			}
			out, entries = append(appendEntry(out, entry), data...), rest[size:]
		}
		return out, nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil // no FIFO can be read
	}
	return err
}

// number returns the last value of a field of a protobuf message, or 0.
func number(message []byte, field protowire.Number) (value uint64) {
	for len(message) > 0 {
		num, kind, head := protowire.ConsumeTag(message)
		if head < 0 {
			return 0
		}
		size := protowire.ConsumeFieldValue(num, kind, message[head:])
		if size < 0 {
			return 0
		}
		if num == field && kind == protowire.VarintType {
			value, _ = protowire.ConsumeVarint(message[head:])
		}
		message = message[head+size:]
	}
	return value
}

// renameEntry changes the name in a file_entry, if it is that of a regular file,
// among which CRIU counts FIFOs.
func renameEntry(entry []byte, names map[string]string) ([]byte, error) {
	return replace(entry, fieldRegular, func(regular []byte) ([]byte, error) {
		return replace(regular, fieldName, func(name []byte) ([]byte, error) {
			if new, ok := names[string(name)]; ok {
				return []byte(new), nil
			}
			return name, nil
		})
	})
}

// replace returns a protobuf message with one field, of bytes, changed.
func replace(message []byte, field protowire.Number, change func([]byte) ([]byte, error)) ([]byte, error) {
	var out []byte
	for len(message) > 0 {
		number, kind, head := protowire.ConsumeTag(message)
		if head < 0 {
			return nil, errImage
		}
		size := protowire.ConsumeFieldValue(number, kind, message[head:])
		if size < 0 {
			return nil, errImage
		}
		if number == field && kind == protowire.BytesType {
			value, _ := protowire.ConsumeBytes(message[head:])
			changed, err := change(value)
			if err != nil {
				return nil, err
			}
			out = protowire.AppendBytes(protowire.AppendTag(out, number, kind), changed)
		} else {
			out = append(out, message[:head+size]...)
		}
		message = message[head+size:]
	}
	return out, nil
}
