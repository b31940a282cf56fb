package host

import (
	"os"
	"testing"
)

func TestReadyAttach(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("probe: effective user is not root, who alone may move processes")
	}
	before, err := os.ReadFile(selfCgroup)
	if err != nil {
		t.Fatal(err)
	}
	ReadyAttach()()
	if after, err := os.ReadFile(selfCgroup); err != nil || string(after) != string(before) {
		t.Errorf("it has moved this process:\n%s->\n%s%v", before, after, err)
	}
}
