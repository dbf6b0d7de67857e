package crash

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"
	"testing/cryptotest"
	"time"

	"kvtier/tiers/files/filestest"
)

var (
	faulty   = flag.Int("faulty", 20, "how many disks with faults are worked on")
	faultNow = flag.Int("fault", -1, "work on this one only, of all those that -seed makes")
)

// mixes of faults: a disk that fails, one that reads wrongly, one that writes wrongly.
var mixes = []struct {
	name string
	filestest.Faults
}{
	{"fails", filestest.Faults{Fail: .03, Full: .01, Short: .02, Slow: .05}},
	{"reads wrongly", filestest.Faults{Flip: .05, Slow: .02}},
	{"writes wrongly", filestest.Faults{Drop: .02, Stray: .02}},
	{"does it all", filestest.Faults{Fail: .02, Full: .01, Short: .01, Flip: .02, Drop: .01, Stray: .01}},
}

const (
	stepsBeforeFaults = 8
	stepsWithFaults   = 25
)

// TestFaultyDisk works on a disk in memory whose operations fail, end early or
// lie, and then, without faults, holds a new daemon to what was acknowledged.
func TestFaultyDisk(t *testing.T) {
	if testing.Short() {
		*faulty = min(*faulty, 6)
	}
	var sum tally
	begin, done, refused := time.Now(), 0, 0
	counts := map[string]int{}
	for n := range *faulty {
		if *faultNow >= 0 && n != *faultNow {
			continue
		}
		done++
		r := &faultRound{rng: rand.New(rand.NewPCG(*seed, uint64(n)+1<<56)), disk: filestest.NewDisk()}
		r.w = known{gone: map[string]bool{}}.worker(&worker{size: inMemorySize, specs: specs()}, r.rng)
		err := r.run(t)
		for what, n := range r.counts {
			counts[what] += n
		}
		sum.add(r.w.tally)
		refused += r.refused
		if err != nil {
			t.Errorf("disk %d of seed %d, which %s and then %s: %v\nwrong: %v, lied about %v", n, *seed, r.mix, r.end, err, r.counts, r.disk.Lied())
			break
		}
	}
	what := ""
	for _, k := range slices.Sorted(maps.Keys(counts)) {
		what += fmt.Sprintf(", %d %s", counts[k], k)
	}
	fmt.Printf("faults: %d disks%s; %d calls failed, %d starts refused; %d positions acknowledged as power-safe, %d lost of those not lied about, %d sequences said to be damaged, "+
		"%d answers checked, %d wrong, %d rows read back, %d wrong; seed %d, %v\n",
		done, what, sum.failed, refused, sum.acked, sum.lost, sum.damaged, sum.answers, sum.wrong, sum.rows, sum.wrongRows, *seed, time.Since(begin).Round(time.Second))
}

// faultRound is the life of one disk.
type faultRound struct {
	rng      *rand.Rand
	disk     *filestest.Disk
	w        *worker
	mix, end string
	counts   map[string]int
	refused  int // starts
}

func (r *faultRound) run(t *testing.T) error {
	cryptotest.SetGlobalRandom(t, r.rng.Uint64())
	ctx := t.Context()
	mix := mixes[r.rng.IntN(len(mixes))]
	r.mix = mix.name
	d, err := openOn(ctx, r.disk, func(int) {})
	if err != nil {
		return err
	}
	r.w.lying = mix.Drop > 0
	if err := r.work(ctx, d, mix.Faults); err != nil {
		return errors.Join(fmt.Errorf("%w\n%s", err, d.log), d.close(ctx))
	}
	next := r.finish(ctx, d)
	r.counts = r.disk.Counts()
	r.note(r.disk.Lied())
	// A disk that reads wrongly does so when the daemon starts, too. It may refuse to.
	reads := filestest.Faults{Fail: mix.Fail, Short: mix.Short, Slow: mix.Slow}
	if mix.Fail+mix.Drop == 0 && r.end != "loses power" { // CHANGES is up to date: it tells of a catalogue not read to its end
		reads.Flip = mix.Flip
	}
	next.Misbehave(reads, r.rng.Uint64())
	if d, err := openOn(ctx, next, func(int) {}); err != nil {
		r.refused++
	} else {
		_ = d.close(ctx) // it may fail
	}
	next.Misbehave(filestest.Faults{}, 0)
	for what, n := range next.Counts() {
		r.counts[what] += n
	}
	_, err = life(t, next, r.w, stepsAfterCut, 0)
	return err
}

// work lets the worker work, at first without faults.
func (r *faultRound) work(ctx context.Context, d *inMemory, f filestest.Faults) error {
	r.w.p = d.clients
	for i := range stepsBeforeFaults + stepsWithFaults {
		if i == stepsBeforeFaults {
			r.disk.Misbehave(f, r.rng.Uint64())
			r.w.faulty = true
		}
		r.w.ops++
		if err := r.w.step(ctx); err != nil && !errors.Is(err, errFault) {
			return err
		}
		if err := d.settled(ctx); err != nil {
			return err
		}
	}
	r.w.faulty = false
	return nil
}

// finish ends the daemon and returns what the disk then holds.
func (r *faultRound) finish(ctx context.Context, d *inMemory) *filestest.Disk {
	ops := r.disk.Ops()
	_ = d.close(ctx) // it may fail
	switch r.rng.IntN(3) {
	case 0:
		r.end = "stops"
		return r.disk.Kill(r.disk.Ops())
	case 1:
		r.end = "is killed"
		return r.disk.Kill(ops)
	}
	r.end = "loses power"
	return r.disk.PowerCut(ops, r.rng)
}

// note says what the disk lied about.
func (r *faultRound) note(names []string) {
	r.w.lies.logs = map[string]bool{}
	for _, name := range names {
		switch path.Base(path.Dir(name)) {
		case "tails":
			id, _, _ := strings.Cut(path.Base(name), "-")
			r.w.lies.logs[id] = true
		case "segments":
			r.w.lies.extents = true
		}
	}
}
