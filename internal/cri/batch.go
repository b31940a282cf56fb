package cri

import (
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// maxBatch bounds the items in one message of a streamed list, in bytes. It is
// below what any gRPC client accepts unless told otherwise, 4 MiB; the kubelet's
// accepts 16.
const maxBatch = 3 << 20

// sendBatches hands items to send in as few batches as maxBatch allows, each
// item once. An item that is larger by itself goes alone. Nothing is sent for no
// items: the end of the stream says so.
func sendBatches[T proto.Message](items []T, send func([]T) error) error {
	for len(items) > 0 {
		n, size := 1, itemSize(items[0])
		for n < len(items) {
			if size += itemSize(items[n]); size > maxBatch {
				break
			}
			n++
		}
		if err := send(items[:n]); err != nil {
			return err
		}
		items = items[n:]
	}
	return nil
}

// itemSize is what an item takes as an element of a repeated field with a number
// below 16.
func itemSize(m proto.Message) int { return 1 + protowire.SizeBytes(proto.Size(m)) }
