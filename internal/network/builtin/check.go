package builtin

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/google/nftables"

	"sampan.dev/sampan/internal/fsck"
	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/network"
	"sampan.dev/sampan/internal/state"
)

const sweeps = "the daemon's next start removes it"

// Check compares the records of pods with each other, with the pods that
// are known, and with the links there are. It changes nothing.
func Check(cfg Config, known func(podID string) bool) ([]fsck.Problem, error) {
	link := cfg.Link
	if link == "" {
		link = defaultLink
	}
	h, err := openHostSide(cfg.NetNS, link)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	links, err := h.podLinks()
	if err != nil {
		return nil, err
	}
	there := make(map[string]bool, len(links))
	for _, name := range links {
		there[name] = true
	}
	records, problems, err := checkRecords(shelf{cfg.Dir, cfg.State}, known)
	if err != nil {
		return nil, err
	}
	if _, err := (shelf{cfg.Dir, cfg.State}).subnets(); errors.Is(err, state.ErrVersion) {
		problems = append(problems, fsck.Problem{Object: "network", What: err.Error(), Remedy: fsck.NewerWrote})
	} else if err != nil {
		problems = append(problems, fsck.Problem{Object: "network", What: err.Error(), Remedy: "the subnets of the configuration count until the kubelet tells its own again"})
	}
	for _, r := range records {
		if !r.Leaving && !there[r.Link] {
			problems = append(problems, fsck.Problem{Object: "pod " + r.Name, What: fmt.Sprintf("its link %s is gone", r.Link), Remedy: "its containers have no network: remove the pod, so that it is made anew"})
		}
		delete(there, r.Link)
	}
	for name := range there {
		problems = append(problems, fsck.Problem{
			Object: "link " + name, What: "it belongs to no pod", Remedy: sweeps,
			Repair: func() error {
				h, err := openHostSide(cfg.NetNS, link)
				if err != nil {
					return err
				}
				return errors.Join(h.rt.do(delLink(name)), h.Close())
			},
		})
	}
	forwards, err := checkForwards(h, cfg.NetNS, link, records)
	return append(append(problems, conflicts(records)...), forwards...), err
}

// checkForwards compares the elements of the firewall's maps with the records: what
// goes to a pod that is not there would be given to the next pod of that address.
func checkForwards(h *hostSide, netns, link string, records []*record) ([]fsck.Problem, error) {
	there, err := h.firewall.forwards()
	if err != nil {
		return nil, err
	}
	var problems []fsck.Problem
	for _, r := range records {
		missing := 0
		//nolint:errcheck // it does not fail
		h.firewall.elements(r, func(s *nftables.Set, elements []nftables.SetElement) error {
			for _, e := range elements {
				key := forward{s.Name, string(e.Key)}
				if _, ok := there[key]; !ok && !r.Leaving {
					missing++
				}
				delete(there, key)
			}
			return nil
		})
		if missing > 0 {
			problems = append(problems, fsck.Problem{Object: "pod " + r.Name, What: fmt.Sprintf("%d elements of nftables for its host ports are missing", missing), Remedy: "the daemon's next start puts them back"})
		}
	}
	for key, s := range there {
		problems = append(problems, fsck.Problem{
			Object: fmt.Sprintf("nftables map %s of table inet %s", key.set, link), What: fmt.Sprintf("its element %x belongs to no pod", key.key), Remedy: sweeps,
			Repair: func() error {
				h, err := openHostSide(netns, link)
				if err != nil {
					return err
				}
				return errors.Join(h.firewall.delete(s, []byte(key.key)), h.Close())
			},
		})
	}
	return problems, nil
}

// checkRecords reads all records of this boot.
func checkRecords(s shelf, known func(podID string) bool) ([]*record, []fsck.Problem, error) {
	entries, err := os.ReadDir(s.path(""))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, nil, err
	}
	var records []*record
	var problems []fsck.Problem
	for _, e := range entries {
		if !network.IsPodID(e.Name()) {
			continue
		}
		object := "network of pod " + e.Name()[:13]
		var r record
		err := state.Read(s.path(e.Name()), podKind, &r)
		switch {
		case errors.Is(err, os.ErrNotExist):
		case errors.Is(err, state.ErrVersion):
			problems = append(problems, fsck.Problem{Object: object, What: err.Error(), Remedy: fsck.NewerWrote})
		case err != nil:
			problems = append(problems, fsck.Problem{Object: object, What: err.Error(), Remedy: "the daemon's next start makes it again from what the kernel knows; host ports are lost"})
		case r.Boot != host.BootID():
		case !r.Leaving && !known(r.Pod):
			problems = append(problems, fsck.Problem{Object: object, What: "there is no such pod", Remedy: sweeps})
		default:
			records = append(records, &r)
		}
	}
	return records, problems, nil
}

// conflicts finds addresses and host ports that two pods have.
func conflicts(records []*record) []fsck.Problem {
	var problems []fsck.Problem
	holders := make(map[netip.Addr]string)
	for i, r := range records {
		for _, ip := range r.IPs {
			if other, taken := holders[ip.Addr]; taken {
				problems = append(problems, fsck.Problem{Object: "pod " + r.Name, What: fmt.Sprintf("pod %s has its address %s too", other, ip.Addr), Remedy: "remove one of the pods"})
			}
			holders[ip.Addr] = r.Name
		}
		for _, other := range records[:i] {
			if port, taken := network.FirstConflict(r.Ports, other.Ports); taken {
				problems = append(problems, fsck.Problem{Object: "pod " + r.Name, What: fmt.Sprintf("pod %s has its host port %s too", other.Name, port), Remedy: "remove one of the pods"})
			}
		}
	}
	return problems
}
