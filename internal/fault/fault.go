//go:build !faultpoints

// Package fault names the moments at which test/crash kills a process: before and
// after each record and each effect. In a usual build a point is nothing, and the
// compiler leaves it out. With the tag faultpoints a process that passes a point
// kills itself there if it was told to.
//
// Names are constants, at the place itself, so that a test can list them from the
// source and find those that nothing passes. The package knows nothing of what the
// points are about.
package fault

// Point is a moment, called "what.done".
func Point(name string) {}

// Record is a moment in the life of a record of the kind, called "record.KIND.STEP".
func Record(kind, step string) {}
