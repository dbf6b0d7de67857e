package sparse

import (
	"context"
	"encoding/binary"
	"hash/fnv"
	"math"
	"math/rand/v2"
	"testing"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/seal"
)

// hasty leaves ranges out.
type hasty struct {
	*memReader
	late  func(r *tiers.Request, x tiers.Range) bool
	bytes int64 // left out
}

func (h *hasty) Pin(ctx context.Context, reqs []tiers.Request) ([]tiers.Pin, tiers.Moved, error) {
	pins, moved, err := h.memReader.Pin(ctx, reqs)
	for i := range pins {
		for j, x := range reqs[i].Ranges {
			if h.late(&reqs[i], x) {
				pins[i].Ranges[j] = nil
				pins[i].Late += x.Len
				h.bytes += int64(x.Len)
			}
		}
	}
	return pins, moved, err
}

// blocksLate leaves a share of the blocks of planes out, always the same of them.
func blocksLate(share float64, seed uint64, planes tiers.PlaneSet) func(r *tiers.Request, x tiers.Range) bool {
	return func(r *tiers.Request, x tiers.Range) bool {
		if !planes.Has(r.Plane) {
			return false
		}
		off, _, _ := r.Header.Piece(r.Head, r.Plane)
		for b := (off + x.Off) / 512; b <= (off+x.Off+x.Len-1)/512; b++ { // small ones: contexts are small here
			h := fnv.New64a()
			_, _ = h.Write(binary.LittleEndian.AppendUint64(append([]byte{byte(r.Plane)}, r.Header.ID[:]...), uint64(b)^seed<<32))
			if float64(h.Sum64()>>11)/(1<<53) < share {
				return true
			}
		}
		return false
	}
}

// rangesLate leaves a share of the ranges of planes out.
func rangesLate(share float64, seed uint64, planes tiers.PlaneSet) func(r *tiers.Request, x tiers.Range) bool {
	return func(r *tiers.Request, x tiers.Range) bool {
		h := fnv.New64a()
		_, _ = h.Write(binary.LittleEndian.AppendUint64(append([]byte{byte(r.Plane)}, r.Header.ID[:]...), uint64(x.Off)^seed<<32))
		return planes.Has(r.Plane) && float64(h.Sum64()>>11)/(1<<53) < share
	}
}

const notMeans = tiers.AllPlanes &^ (1<<tiers.PlanePages | 1<<tiers.PlaneMap)

func lateFixture(rng *rand.Rand) *fixture {
	return sealed(rng, newSample(rng, 6144, 1, 64), seal.Options{Profile: tiers.ProfileBalanced}, compress.BF16, 2048, 4096, 6144)
}

// askLate answers through a hasty reader.
func (f *fixture) askLate(t *testing.T, q Query, b Budget, late func(r *tiers.Request, x tiers.Range) bool) ([][]float32, Account) {
	t.Helper()
	h := &hasty{memReader: f.reader, late: late}
	q.Hasty = h
	q.Partials = attention.ClonePartials(q.Partials)
	out, acc := f.ask(t, q, b)
	if acc.LateBytes != h.bytes || (acc.Late > 0) != (h.bytes > 0) {
		t.Fatalf("%d bytes were late, the account says %d, and %d tokens", h.bytes, acc.LateBytes, acc.Late)
	}
	if n := int64(f.n - f.sinks); acc.Late > n || acc.Read+acc.Estimated != n {
		t.Fatalf("account %+v of %d tokens", acc, n)
	}
	return out, acc
}

func equal(t *testing.T, what string, got, want [][]float32) {
	t.Helper()
	for r := range want {
		for i := range want[r] {
			if got[r][i] != want[r][i] {
				t.Fatalf("%s: row %d is %v..., not %v...", what, r, got[r][i], want[r][i])
			}
		}
	}
}

// A reader that leaves nothing out changes nothing.
func TestInTime(t *testing.T) {
	rng := rand.New(rand.NewPCG(71, 72))
	f := lateFixture(rng)
	for _, b := range []Budget{{Share: .03}, {Share: .1}, {Share: .3}, {Share: .9}, {Share: .3, ByPage: true}} {
		q := f.query(rng, 0, 3)
		got, acc := f.askLate(t, q, b, func(*tiers.Request, tiers.Range) bool { return false })
		q.Partials = attention.NewPartials(3, f.d)
		want, plain := f.ask(t, q, b)
		equal(t, "nothing late", got, want)
		if acc.Late != 0 || acc.Read != plain.Read || acc.Scanned != plain.Scanned || acc.Error != plain.Error {
			t.Errorf("accounts %+v and %+v", acc, plain)
		}
	}
}

// What stands for what is late is what would, had it not been asked for: of all values their tokens' weights, of all
// keys the pages' means.
func TestLateIsUnread(t *testing.T) {
	rng := rand.New(rand.NewPCG(73, 74))
	f := lateFixture(rng)
	part := []int{0, 1, 2}
	for _, c := range []struct {
		name   string
		planes tiers.PlaneSet
		stages func(u *run) []func() error
	}{
		{"values", 1<<tiers.PlaneV4 | 1<<tiers.PlaneDrains, func(u *run) []func() error {
			return []func() error{u.scorePages, u.scan, func() error { return u.refine(1) }, func() error { return u.refine(2) },
				func() error { return u.refine(3) }, func() error { u.normalise(); return nil }}
		}},
		{"keys", notMeans, func(u *run) []func() error { return []func() error{u.scorePages} }},
		{"steps", 1 << tiers.PlaneSteps, func(u *run) []func() error { return []func() error{u.scorePages} }},
		{"first keys", 1 << tiers.PlaneK1, func(u *run) []func() error { return []func() error{u.scorePages} }},
	} {
		for range 5 {
			q := f.query(rng, 0, 3)
			got, acc := f.askLate(t, q, Budget{Share: .5}, blocksLate(1, 0, c.planes))
			u := newRun(t.Context(), f.reader, f.segs, part, Query{Q: q.Q, Partials: attention.ClonePartials(q.Partials)}, Budget{Share: .5}, &Trace{})
			for _, stage := range c.stages(u) {
				if err := stage(); err != nil {
					t.Fatal(err)
				}
			}
			u.finish()
			want, err := make([][]float32, 3), u.acc.Error
			for r := range want {
				want[r] = make([]float32, f.d)
				u.q.Partials[r].Output(want[r])
			}
			u.release()
			if e := meanError(got, want); e > 1e-5 || math.Abs(float64(acc.Error-err)) > 1e-4 {
				t.Errorf("%s: answer differs by %v, raw error %v and %v", c.name, e, acc.Error, err)
			}
			if acc.Read != 0 || acc.Late == 0 {
				t.Errorf("%s: account %+v", c.name, acc)
			}
		}
	}
}

// Whatever is late, an answer is what its trace says: of read tokens the stored value by its weight, of all others their
// page's mean value by theirs, of which each token has one. A token whose value is late was not read, and one whose first bits are
// is estimated.
func TestLateTrace(t *testing.T) {
	rng := rand.New(rand.NewPCG(75, 76))
	f := lateFixture(rng)
	f.reader = f.reader.without(tiers.PlaneMap) // values do not follow keys: means alone stand for them
	values := make([]*DecodedRows, len(f.segs))
	for i, s := range f.segs {
		var err error
		if values[i], _, err = Rows(t.Context(), f.reader, at4Bits(s), 0); err != nil {
			t.Fatal(err)
		}
	}
	counts := map[How]int{}
	for i := range 36 {
		b := Budget{Share: .5, ByPage: i >= 24}
		q := f.query(rng, 0, 2)
		late := blocksLate([]float64{.02, .2, .6}[i%3], uint64(i), notMeans)
		lateK1 := func(seg, place int) bool {
			leaf := place / tiers.LeafTokens
			v := view(f.segs[seg], 0)
			n := compress.KeyPlaneBytes(f.d)[0]
			page := leaf / 4
			first, end := v.LeavesOf(page)
			for l := first; l < end; l++ { // as a leaf of its own at least: ranges that are joined are late together
				if late(&tiers.Request{Header: f.segs[seg].Header, Plane: tiers.PlaneK1}, tiers.Range{Off: l * n, Len: n}) {
					return true
				}
			}
			return false
		}
		outs, seen := attention.NewPartials(2, f.d), map[[3]int]bool{}
		tr := &Trace{Token: func(row, segment, place int, log float32, how How) {
			if key := [3]int{row, segment, place}; seen[key] {
				t.Fatalf("token %v twice", key)
			} else {
				seen[key] = true
			}
			counts[how]++
			v, value := view(f.segs[segment], 0), make([]float32, f.d)
			page := place / tiers.PageTokens
			means := f.meanValues(t, segment, v)
			switch {
			case how == Read:
				copy(value, values[segment].V[place*f.d:])
			case how == Scanned && v.IsDrain(place/tiers.LeafTokens) && !b.ByPage:
			default:
				means.Row(value, page)
			}
			outs[row].Add(log, value)
			if how != Estimated && lateK1(segment, place) {
				t.Fatalf("token %d of segment %d is known by late bits", place, segment)
			}
			if _, codes := v.ValueRanges(place); how == Read && late(&tiers.Request{Header: f.segs[segment].Header, Plane: tiers.PlaneV4}, codes) {
				t.Fatalf("token %d of segment %d has a late value", place, segment)
			}
		}}
		h := &hasty{memReader: f.reader, late: late}
		q.Hasty = h
		acc, err := Attend(t.Context(), f.reader, f.segs, q, b, tr)
		if err != nil {
			t.Fatal(err)
		}
		if n := f.reader.live.Load(); n != 0 {
			t.Fatalf("%d pins leaked", n)
		}
		if acc.Late == 0 || acc.LateBytes != h.bytes || len(seen) != 2*f.n {
			t.Errorf("%d tokens and %d bytes late, of %d bytes; %d traced", acc.Late, acc.LateBytes, h.bytes, len(seen))
		}
		for r := range outs {
			compress.Unrotate(outs[r].Out, f.d)
			got, want := make([]float32, f.d), make([]float32, f.d)
			q.Partials[r].Output(got)
			outs[r].Output(want)
			if e := attention.RelativeError(got, want); e > 2e-3 {
				t.Errorf("query %d, row %d: the answer differs by %v from what its trace says", i, r, e)
			}
			if d := math.Abs(float64(q.Partials[r].LSE() - outs[r].LSE())); d > 1e-3 {
				t.Errorf("query %d, row %d: log-sum-exp differs by %v", i, r, d)
			}
		}
	}
	if counts[Read] == 0 || counts[Scanned] == 0 {
		t.Errorf("traced %v", counts)
	}
}

// at4Bits is a segment of which the low planes are not read.
func at4Bits(s Segment) Segment {
	s.Low = false
	return s
}

// The more is late, the larger is the error, and the larger it is believed to be: late tokens count in it as unread ones.
// What factors of calls of which nothing is late make of a raw error covers those of which something is: their raw errors
// err less.
func TestLateErrors(t *testing.T) {
	rng := rand.New(rand.NewPCG(77, 78))
	f := lateFixture(rng)
	const n = 40
	for i, scale := range []float32{.5, 1, .5, 1} {
		budget := []float32{.1, .1, .2, .2}[i]
		var before, calm float32
		for _, share := range []float64{0, .1, .3, .6, 1} {
			var e, raw, most float32
			for i := range n {
				q := f.query(rand.New(rand.NewPCG(79, uint64(i))), 0, 3)
				for j := range q.Q {
					q.Q[j] *= scale
				}
				want, _ := f.dense(q, f.k, f.v)
				got, acc := f.askLate(t, q, Budget{Share: budget}, rangesLate(share, uint64(i), notMeans))
				err := meanError(got, want)
				e, raw, most = e+err/n, raw+acc.Error/n, max(most, err/max(acc.Error, 1e-3))
			}
			t.Logf("budget %v, queries by %v, late %v: error %.4f, raw %.4f, largest ratio %.2f", budget, scale, share, e, raw, most)
			if raw < .9*before {
				t.Errorf("late %v: raw error %v after %v", share, raw, before)
			}
			if before = raw; share == 0 {
				calm = max(most, 1)
			}
			if most > 1.4*calm {
				t.Errorf("late %v: an error of %v times the raw one, %v where nothing is late", share, most, calm)
			}
		}
	}
}

// Failures at any stage come through, and leave nothing pinned.
func TestLateAndFailed(t *testing.T) {
	rng := rand.New(rand.NewPCG(81, 82))
	f := lateFixture(rng)
	h := &hasty{memReader: f.reader, late: blocksLate(.3, 1, notMeans)}
	for i := range 14 {
		b := Budget{Share: .2, ByPage: i >= 12}
		f.reader.calls.Store(0)
		f.reader.fail = int64(i%12 + 1)
		q := f.query(rng, 0, 2)
		q.Hasty = h
		_, err := Attend(t.Context(), f.reader, f.segs, q, b, nil)
		if n := f.reader.live.Load(); n != 0 {
			t.Fatalf("call %d: %d pins leaked", i+1, n)
		}
		if (i < 6 || b.ByPage) && err == nil {
			t.Errorf("call %d failed, and the answer says nothing", i+1)
		}
	}
	// Forks' cut segments are read whole, and waited for.
	f.reader.fail = 0
	f.segs[2].Limit = 1000
	late := f.segs[2].Header.ID
	h.late = func(r *tiers.Request, _ tiers.Range) bool {
		if r.Header.ID == late {
			t.Error("a cut segment was read in haste")
		}
		return false
	}
	q := f.query(rng, 0, 2)
	q.Hasty = h
	if _, err := Attend(t.Context(), f.reader, f.segs, q, Budget{Share: .2}, nil); err != nil {
		t.Fatal(err)
	}
}
