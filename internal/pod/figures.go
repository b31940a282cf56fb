package pod

// Figures are how many of what there are, and what has happened since the start.
type Figures struct {
	Ready, NotReady              int // pods
	Created, Running, Exited     int // containers
	Operations                   int // under way: what makes, changes and removes
	LeaksSwept, KeeperReconnects int64
}

// Figures counts; it waits for nothing.
func (s *Pods) Figures() Figures {
	f := Figures{Operations: s.ops.Len(), LeaksSwept: s.swept.Load(), KeeperReconnects: s.reconnects.Load()}
	for _, p := range s.List() {
		if p.Ready {
			f.Ready++
		} else {
			f.NotReady++
		}
	}
	for _, c := range s.ListContainers() {
		switch c.State {
		case Created:
			f.Created++
		case Running:
			f.Running++
		case Exited, Removing:
			f.Exited++
		}
	}
	return f
}
