package gpu

import (
	"errors"
	"testing"
	"time"

	"kvtier/tiers"
	"kvtier/tiers/gpu/cuda/cudatest"
	"kvtier/tiers/tiertest"
)

// openImpatient makes a tier on device 0, and what has the device stuck, or lets it go on: while it is stuck, the tier waits no longer than patience.
func openImpatient(t *testing.T, o Options, patience time.Duration) (*Tier, func(stuck bool)) {
	t.Helper()
	tier, err := Open(o)
	cudatest.Missing(t, err)
	if err != nil {
		t.Fatal(err)
	}
	stall := func(stuck bool) {
		tier.patience = 30 * time.Second
		if stuck {
			tier.patience = patience
		}
		cudatest.Stall(t, stuck)
	}
	t.Cleanup(func() {
		stall(false)
		tier.closeIn(t)
	})
	return tier, stall
}

// soon waits until something is so.
func soon(t *testing.T, what string, is func() bool) {
	t.Helper()
	for begin := time.Now(); !is(); time.Sleep(time.Millisecond) {
		if time.Since(begin) > 30*time.Second {
			t.Fatal(what)
		}
	}
}

// TestCopiesStuck: where the device does not do what it was asked, a Put and a Pin end when patience does, and all that follows at once; segments can be
// dropped, also one that is coming. What was begun goes on, with its room and its source, and ends well when the device does it.
func TestCopiesStuck(t *testing.T) {
	const patience = 50 * time.Millisecond
	tier, stall := openImpatient(t, Options{Bytes: 1 << 20}, patience)
	there, thesePieces := tiertest.Segment(1, 2, 9000)
	h, pieces := tiertest.Segment(2, 2, 9000)
	other, others := tiertest.Segment(3, 2, 9000)
	put(t, tier, there, thesePieces)
	pin := func() error {
		_, err := tier.Pin(ctx, []tiers.Request{{Header: there}})
		return err
	}
	released := make(chan bool, 1)
	for _, c := range []struct {
		name string
		do   func() error
	}{
		{"put", func() error { return tier.PutFrom(ctx, h, pieces, func() { released <- true }) }},
		{"pin", pin},
	} {
		stall(true)
		begin := time.Now()
		is(t, c.do(), ErrStuck)
		if took := time.Since(begin); took < patience || took > 5*time.Second {
			t.Errorf("%s took %v", c.name, took)
		}
		begin = time.Now()
		is(t, tier.Put(ctx, other, others), ErrStuck)
		is(t, pin(), ErrStuck)
		if _, err := tier.Attend(ctx, []Segment{{Header: there}}, nil, 0, Choice{}); !errors.Is(err, ErrStuck) {
			t.Error(err)
		}
		if took := time.Since(begin); took > patience {
			t.Errorf("after %s: %v", c.name, took)
		}
		if c.name == "put" {
			if tier.Resident(h.ID, pieces[0].Head, pieces[0].Plane) || len(released) > 0 {
				t.Error("a copy that is under way has arrived, or its source is free")
			}
			if err := tier.Drop(there.ID, tiers.AllPlanes); err != nil {
				t.Error(err)
			}
		}
		stall(false)
		soon(t, c.name+" never ends", func() bool { return tier.late.Load() == 0 })
		if c.name == "put" {
			<-released
			holds(t, tier, h, pieces, true)
			holds(t, tier, there, thesePieces, false)
			put(t, tier, there, thesePieces)
		}
	}
	holds(t, tier, there, thesePieces, true)
	stall(true)
	is(t, tier.Put(ctx, other, others), ErrStuck)
	if err := tier.Drop(other.ID, tiers.AllPlanes); err != nil {
		t.Fatal(err)
	}
	stall(false)
	soon(t, "it never ends", func() bool { return tier.late.Load() == 0 })
	holds(t, tier, other, others, false)
	for _, h := range []*tiers.Header{there, h} {
		if err := tier.Drop(h.ID, tiers.AllPlanes); err != nil {
			t.Fatal(err)
		}
	}
	empty(t, tier)
}

// TestCloseStuck: Close does not wait for a device that does not answer, be it a copy that is under way or memory that it is to free. When it does, its memory is given
// back all the same.
func TestCloseStuck(t *testing.T) {
	const patience = 50 * time.Millisecond
	h, pieces := tiertest.Segment(1, 2, 9000)
	for _, what := range []string{"put", "pin", "give up"} {
		t.Run(what, func(t *testing.T) {
			tier, stall := openImpatient(t, Options{Bytes: 1 << 20}, patience)
			put(t, tier, h, pieces)
			end := tier.Close
			stall(true)
			begin := time.Now()
			go func() {
				switch what {
				case "put", "give up":
					other, others := tiertest.Segment(2, 2, 9000)
					_ = tier.Put(ctx, other, others)
				case "pin":
					_, _ = tier.Pin(ctx, []tiers.Request{{Header: h}})
				}
			}()
			if what == "give up" {
				end = func() error { return tier.GiveUp(errors.New("it answers wrongly")) }
			}
			time.Sleep(patience / 2) // under way
			is(t, end(), ErrStuck)
			if took := time.Since(begin); took > 5*time.Second {
				t.Errorf("it took %v", took)
			}
			stall(false)
			soon(t, "its memory is never given back", func() bool { return tier.Usage().BytesUsed == 0 })
		})
	}
}
