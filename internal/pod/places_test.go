package pod

import "testing"

func TestSlicePath(t *testing.T) {
	for slice, want := range map[string]string{
		"-.slice":                       "/",
		"sampan.slice":                  "/sampan.slice",
		"kubepods-burstable-pod1.slice": "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice",
	} {
		if got := slicePath(slice); got != want {
			t.Errorf("slicePath(%q) = %q, want %q", slice, got, want)
		}
	}
}
