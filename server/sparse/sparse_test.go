package sparse

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/seal"
)

// fixture is a sealed context with its reader.
type fixture struct {
	*sample
	reader *memReader
	segs   []Segment
	ends   []int
	sinks  int
}

// sealed seals a sample in segments that end where ends says.
func sealed(rng *rand.Rand, s *sample, o seal.Options, t compress.ElementType, ends ...int) *fixture {
	f := &fixture{sample: s, reader: newMemReader(), ends: ends, sinks: o.Sinks}
	lo := 0
	o.Metrics = s.metrics(rng)
	for _, hi := range ends {
		f.segs = append(f.segs, f.reader.add(s.rows(lo, hi, t), o))
		lo, o.Sinks = hi, 0
	}
	return f
}

// plane returns what is stored of a plane of a segment's first head.
func (f *fixture) plane(segment int, p tiers.Plane) []byte {
	h := f.segs[segment].Header
	off, n, _ := h.Piece(0, p)
	return f.reader.parts[h.ID][p.Part()][off : off+n]
}

// meanValues returns the mean values of a segment's pages.
func (f *fixture) meanValues(t *testing.T, segment int, v seal.View) attention.Means {
	t.Helper()
	var m seal.PageMeans
	if err := v.PageMeans(&m, f.plane(segment, tiers.PlanePages)); err != nil {
		t.Fatal(err)
	}
	return m.Values
}

// query makes rows that ask near some of the keys.
func (f *fixture) query(rng *rand.Rand, head, rows int) Query {
	q := make([]float32, 0, rows*f.d)
	for range rows {
		t := rng.IntN(f.n)
		for _, x := range f.k[(t*f.heads+head)*f.d:][:f.d] {
			q = append(q, (x+2*float32(rng.NormFloat64()))/float32(math.Sqrt(float64(f.d))))
		}
	}
	return Query{Head: head, Q: q, Partials: attention.NewPartials(rows, f.d)}
}

// ask answers, and checks what every answer must keep.
func (f *fixture) ask(t *testing.T, q Query, b Budget) ([][]float32, Account) {
	t.Helper()
	acc, err := Attend(context.Background(), f.reader, f.segs, q, b, nil)
	if err != nil {
		t.Fatal(err)
	}
	if n := f.reader.live.Load(); n != 0 {
		t.Fatalf("%d pins leaked", n)
	}
	var out [][]float32
	for r := range q.Partials {
		o := make([]float32, f.d)
		q.Partials[r].Output(o)
		if !compress.Finite(o) || math.IsNaN(float64(q.Partials[r].LSE())) {
			t.Fatalf("row %d is not finite", r)
		}
		out = append(out, o)
	}
	if !(acc.Error >= 0 && acc.Error <= 1) {
		t.Fatalf("estimated error %v", acc.Error)
	}
	return out, acc
}

// dense is attention over rows, in the shape that ask returns, and its log-sum-exp.
func (f *fixture) dense(q Query, k, v []float32) (out [][]float32, lse []float32) {
	ps := attention.NewPartials(len(q.Partials), f.d)
	attention.Attend(ps, q.Q, k, v, f.d, q.Softcap, nil)
	for r := range ps {
		o := make([]float32, f.d)
		ps[r].Output(o)
		out, lse = append(out, o), append(lse, ps[r].LSE())
	}
	return out, lse
}

func meanError(got, want [][]float32) (e float32) {
	for r := range want {
		e += attention.RelativeError(got[r], want[r]) / float32(len(want))
	}
	return e
}

// Budget.All: each profile errs by no more than its codec; exact not at all.
func TestAll(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for _, d := range []int{16, 64, 80, 128, 256} {
		for _, c := range []struct {
			profile tiers.Profile
			low     bool
			limit   float32
		}{{tiers.ProfileExact, false, 1e-5}, {tiers.ProfileNeutral, false, .02}, {tiers.ProfileBalanced, true, .02}, {tiers.ProfileBalanced, false, .25}} {
			for _, softcap := range []float32{0, 5} {
				o := seal.Options{Profile: c.profile, Low: c.low, Sinks: tiers.SinkTokens}
				f := sealed(rng, newSample(rng, 700, 2, d), o, compress.F32, 300, 333, 700)
				for head := range 2 {
					q := f.query(rng, head, 3)
					q.Softcap = softcap
					got, acc := f.ask(t, q, Budget{All: true})
					k, v := f.head(f.k, head, f.sinks, f.n), f.head(f.v, head, f.sinks, f.n)
					want, lse := f.dense(q, k, v)
					if e := meanError(got, want); e > c.limit {
						t.Errorf("d %d, %+v, softcap %v: error %v", d, c, softcap, e)
					}
					for r := range lse {
						if e := math.Abs(float64(q.Partials[r].LSE() - lse[r])); e > 10*float64(c.limit) {
							t.Errorf("d %d, %+v: log-sum-exp is off by %v", d, c, e)
						}
					}
					if n := int64(f.n - f.sinks); acc.Read != n || acc.Scanned != n || acc.Estimated != 0 || acc.Error != 0 {
						t.Errorf("account %+v of %d tokens", acc, n)
					}
				}
			}
		}
	}
}

// Budget.All is dense attention over the rows that Rows returns.
func TestAllIsRows(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	f := sealed(rng, newSample(rng, 900, 1, 64), seal.Options{Profile: tiers.ProfileBalanced}, compress.BF16, 500, 900)
	q := f.query(rng, 0, 4)
	var k, v []float32
	for _, s := range f.segs {
		rows, _, err := Rows(context.Background(), f.reader, s, 0)
		if err != nil {
			t.Fatal(err)
		}
		if !rows.Rotated || rows.Exact {
			t.Fatal("coded rows are rotated and not exact")
		}
		compress.Unrotate(rows.V, f.d)
		k, v = append(k, rows.K...), append(v, rows.V...)
	}
	want, _ := f.dense(q, k, v)
	got, _ := f.ask(t, q, Budget{All: true})
	if e := meanError(got, want); e > 1e-4 { // scoring codes rounds queries (compress.KeyLayout.Fold)
		t.Errorf("error %v", e)
	}
	// Lossless rows are those that were appended.
	f = sealed(rng, f.sample, seal.Options{Profile: tiers.ProfileExact, Sinks: 16}, compress.F32, 400)
	rows, _, err := Rows(context.Background(), f.reader, f.segs[0], 0)
	if err != nil || !rows.Exact || rows.Rotated {
		t.Fatal(err)
	}
	for i, pos := range rows.Positions {
		if pos != i+16 || rows.K[i*f.d] != f.k[pos*f.d] || rows.V[i*f.d+5] != f.v[pos*f.d+5] {
			t.Fatalf("row %d at position %d differs", i, pos)
		}
	}
}

// A fork sees the tokens before its limit and no others, whatever the budget.
func TestCut(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	for _, profile := range []tiers.Profile{tiers.ProfileExact, tiers.ProfileNeutral} {
		for _, limit := range []int{0, 1, 16, 17, 64, 300, 599} {
			f := sealed(rng, newSample(rng, 600, 1, 64), seal.Options{Profile: profile, Sinks: 16}, compress.F32, 600)
			f.segs[0].Limit = limit
			q := f.query(rng, 0, 2)
			lo := min(limit, 16)
			want, _ := f.dense(q, f.head(f.k, 0, lo, limit)[(min(16, limit)-lo)*f.d:], f.head(f.v, 0, lo, limit))
			got, acc := f.ask(t, q, Budget{Share: .1})
			if e := meanError(got, want); e > map[tiers.Profile]float32{tiers.ProfileExact: 1e-5, tiers.ProfileNeutral: .05}[profile] {
				t.Errorf("profile %d, limit %d: error %v", profile, limit, e)
			}
			if acc.Read != int64(limit-lo) {
				t.Errorf("limit %d: read %d", limit, acc.Read)
			}
		}
	}
}

// Weights sum to 1: if all values are alike, so is the answer. Unread drains make it shorter: sealing always takes
// some tokens for drains, and their values for next to nothing.
func TestConstantValues(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 8))
	for _, share := range []float32{.01, .05, .1, .2, .5, 1} {
		s := newSample(rng, 3000, 1, 64)
		row := randn(rng, s.d, 1)
		for i := range s.v {
			s.v[i] = row[i%s.d]
		}
		f := sealed(rng, s, seal.Options{Profile: tiers.ProfileBalanced}, compress.F32, 2048, 3000)
		got, _ := f.ask(t, f.query(rng, 0, 4), Budget{Share: share})
		for r := range got {
			along := attention.Dot(got[r], row) / attention.Norm2(row)
			want := slices.Clone(row)
			for i := range want {
				want[i] *= along
			}
			if e := attention.RelativeError(got[r], want); e > .12 || along > 1.12 || along < .6 { // half a 4-bit bin
				t.Errorf("share %v: error %v, length %v", share, e, along)
			}
		}
	}
}

// A token that one query wants above all is found, wherever it lies, 19 times
// out of 20: nothing about it is like what the head was asked for before.
func TestNeedle(t *testing.T) {
	rng := rand.New(rand.NewPCG(9, 10))
	missed := 0
	for i := range 40 {
		s := newSample(rng, 4096, 1, 64)
		at := rng.IntN(s.n)
		q := randn(rng, s.d, 1)
		norm := float32(math.Sqrt(float64(attention.Dot(q, q))))
		for j := range q {
			s.k[at*s.d+j] = q[j] * 8 / norm // as long as the others, in a direction of its own
			s.v[at*s.d+j] = 5
		}
		for j := range q {
			q[j] *= 6 / norm
		}
		f := sealed(rng, s, seal.Options{Profile: tiers.ProfileBalanced}, compress.BF16, 2048, 4096)
		query := Query{Q: q, Partials: attention.NewPartials(1, s.d)}
		want, _ := f.dense(query, s.k, s.v)
		got, _ := f.ask(t, query, Budget{Share: .2})
		if e := meanError(got, want); e > .2 {
			t.Logf("needle %d at %d: error %v", i, at, e)
			missed++
		}
	}
	if missed > 2 {
		t.Errorf("%d of 40 needles missed", missed)
	}
}

// Where values follow keys, what keys say of unread values is worth more than means alone.
func TestValuesFollowKeys(t *testing.T) {
	rng := rand.New(rand.NewPCG(41, 42))
	s := newSample(rng, 4096, 1, 64)
	along := randn(rng, 8*s.d, .5)
	for i := range s.n {
		k, v := s.k[i*s.d:(i+1)*s.d], s.v[i*s.d:(i+1)*s.d]
		for j := range v {
			v[j] = attention.Dot(along[j%8*s.d:(j%8+1)*s.d], k) + .3*float32(rng.NormFloat64())
		}
	}
	f := sealed(rng, s, seal.Options{Profile: tiers.ProfileBalanced}, compress.BF16, 2048, 4096)
	deaf := f.reader.without(tiers.PlaneMap)
	var with, without float32
	for range 20 {
		q := f.query(rng, 0, 2)
		for i := range q.Q {
			q.Q[i] *= .5 // many tokens count
		}
		want, _ := f.dense(q, s.k, s.v)
		for _, x := range []struct {
			r   Reader
			sum *float32
		}{{f.reader, &with}, {deaf, &without}} {
			ps := attention.ClonePartials(q.Partials)
			if _, err := Attend(context.Background(), x.r, f.segs, Query{Q: q.Q, Partials: ps}, Budget{Share: .1}, nil); err != nil {
				t.Fatal(err)
			}
			got := make([][]float32, len(ps))
			for r := range ps {
				got[r] = make([]float32, s.d)
				ps[r].Output(got[r])
			}
			*x.sum += meanError(got, want)
		}
	}
	t.Logf("error %.4f with the map, %.4f without", with/20, without/20)
	if with > .8*without {
		t.Errorf("error %.4f with the map, %.4f without", with/20, without/20)
	}
}

// More bytes, less error: true and estimated. No budget is overdrawn.
func TestShares(t *testing.T) {
	rng := rand.New(rand.NewPCG(11, 12))
	for i, d := range []int{64, 128, 64, 128} {
		s, byPage := newSample(rng, 6144, 1, d), i > 1
		f := sealed(rng, s, seal.Options{Profile: tiers.ProfileBalanced}, compress.BF16, 2048, 4096, 6144)
		var before, beforeEstimated float32 = 9, 9
		for _, share := range []float32{.1, .2, .4, .7, 1} {
			var e, estimated float32
			const n = 12
			for i := range n {
				q := f.query(rand.New(rand.NewPCG(13, uint64(i))), 0, 3)
				want, _ := f.dense(q, s.k, s.v)
				got, acc := f.ask(t, q, Budget{Share: share, ByPage: byPage})
				e, estimated = e+meanError(got, want)/n, estimated+acc.Error/n
				if limit := float64(share) * float64(acc.Full); float64(acc.Moved.RAM) > limit*1.01 {
					t.Errorf("d %d, by page %v, share %v: moved %d, budget %.0f", d, byPage, share, acc.Moved.RAM, limit)
				}
				if acc.Read+acc.Estimated != int64(s.n) || acc.Scanned > int64(s.n) {
					t.Errorf("read %d + estimated %d of %d tokens, %d scanned", acc.Read, acc.Estimated, s.n, acc.Scanned)
				}
			}
			t.Logf("d %d, by page %v, share %v: error %.4f, estimated %.4f", d, byPage, share, e, estimated)
			if e > before*1.05 || estimated > beforeEstimated*1.05 {
				t.Errorf("d %d, by page %v, share %v: error %v after %v, estimated %v after %v", d, byPage, share, e, before, estimated, beforeEstimated)
			}
			before, beforeEstimated = e, estimated
		}
	}
}

// Of a short context all pages are skimmed, however little may be read: means say too little of which of two pages holds what a query looks for.
func TestFewPagesAreSkimmed(t *testing.T) {
	rng := rand.New(rand.NewPCG(111, 112))
	for _, n := range []int{64, 112, 192} {
		s := newSample(rng, n, 1, 64)
		f := sealed(rng, s, seal.Options{Profile: tiers.ProfileBalanced}, compress.BF16, n)
		for _, share := range []float32{.1, .3, .7} {
			_, acc := f.ask(t, f.query(rng, 0, 3), Budget{Share: share, ByPage: true})
			if acc.Estimated > 0 && acc.Scanned != int64(n) {
				t.Errorf("%d tokens, share %v: %d are skimmed, %d estimated", n, share, acc.Scanned, acc.Estimated)
			}
		}
	}
	s := newSample(rng, 2048, 1, 64)
	f := sealed(rng, s, seal.Options{Profile: tiers.ProfileBalanced}, compress.BF16, 2048)
	if _, acc := f.ask(t, f.query(rng, 0, 3), Budget{Share: .01, ByPage: true}); acc.Scanned != leastSkimmed*tiers.PageTokens {
		t.Errorf("of 2,048 tokens %d are skimmed, not %d pages", acc.Scanned, leastSkimmed)
	}
}

// Scores hundreds of nats apart, in rows that want different tokens, give
// finite answers and finite errors.
func TestFarApartScores(t *testing.T) {
	rng := rand.New(rand.NewPCG(61, 62))
	s := newSample(rng, 6144, 1, 64)
	f := sealed(rng, s, seal.Options{Profile: tiers.ProfileBalanced}, compress.BF16, 2048, 4096, 6144)
	for _, scale := range []float32{5, 20, 60, 200} {
		for _, b := range []Budget{{Share: .05}, {Share: .1}, {Share: .2}, {Share: .1, ByPage: true}, {Share: .4, ByPage: true}} {
			q := f.query(rng, 0, 6)
			for i := range q.Q {
				q.Q[i] *= scale * float32(1+i/s.d) / 6 // no two rows alike
			}
			got, acc := f.ask(t, q, b)
			if !(acc.Error >= 0 && acc.Error <= 1) {
				t.Errorf("scale %v, %+v: estimated error %v", scale, b, acc.Error)
			}
			for r := range got {
				if n := attention.Norm2(got[r]); !(n >= 0) || math.IsInf(float64(n), 0) {
					t.Errorf("scale %v, %+v, row %d: an output of norm %v", scale, b, r, n)
				}
			}
		}
	}
}

// What was attended before is merged, several rows are independent, and a
// softcap holds on every path.
func TestMergesAndRows(t *testing.T) {
	rng := rand.New(rand.NewPCG(15, 16))
	s := newSample(rng, 3000, 2, 64)
	f := sealed(rng, s, seal.Options{Profile: tiers.ProfileNeutral}, compress.F32, 2048, 2500)
	for _, b := range []Budget{{All: true}, {Share: 1}, {Share: .3}, {Share: .6, ByPage: true}} {
		for _, softcap := range []float32{0, 3} {
			q := f.query(rng, 1, 5)
			q.Softcap = softcap
			k, v := f.head(s.k, 1, 0, s.n), f.head(s.v, 1, 0, s.n)
			want, _ := f.dense(q, k, v)
			attention.Attend(q.Partials, q.Q, k[2500*s.d:], v[2500*s.d:], s.d, softcap, nil)
			got, _ := f.ask(t, q, b)
			limit := map[Budget]float32{{All: true}: .02, {Share: 1}: .2, {Share: .3}: .4, {Share: .6, ByPage: true}: .4}[b]
			if e := meanError(got, want); e > limit {
				t.Errorf("%+v, softcap %v: error %v", b, softcap, e)
			}
		}
	}
}

// Errors at any stage come through and leave nothing pinned.
func TestErrors(t *testing.T) {
	rng := rand.New(rand.NewPCG(17, 18))
	f := sealed(rng, newSample(rng, 3000, 1, 64), seal.Options{Profile: tiers.ProfileBalanced}, compress.BF16, 2048, 3000)
	calls := 0
	for _, b := range []Budget{{All: true}, {Share: .2, ByPage: true}, {Share: .2}} {
		f.reader.fail = 0
		before := f.reader.calls.Load()
		q := f.query(rng, 0, 2)
		ask := func() error {
			_, err := Attend(context.Background(), f.reader, f.segs, Query{Q: q.Q, Partials: attention.ClonePartials(q.Partials)}, b, nil)
			return err
		}
		if err := ask(); err != nil {
			t.Fatal(err)
		}
		calls = int(f.reader.calls.Load() - before)
		for i := range calls {
			f.reader.calls.Store(0)
			f.reader.fail = int64(i + 1)
			if err := ask(); !errors.Is(err, tiers.ErrCorrupt) {
				t.Errorf("%+v, call %d: %v", b, i+1, err)
			}
			if n := f.reader.live.Load(); n != 0 {
				t.Fatalf("%+v, call %d: %d pins leaked", b, i+1, n)
			}
		}
		f.reader.fail = 0
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if _, err := Attend(ctx, f.reader, f.segs, f.query(rng, 0, 2), b, nil); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled: %v", err)
		}
	}
	if calls < 6 {
		t.Errorf("only %d stages read", calls)
	}
	// Bins that no writer makes: checked, though checksums let them through.
	for _, p := range []tiers.Plane{tiers.PlaneSteps, tiers.PlanePages} {
		for _, b := range []Budget{{Share: .5}, {Share: .9, ByPage: true}, {All: true}} { // enough to scan some of every segment
			if b.All && p == tiers.PlanePages {
				continue // not read
			}
			h := f.segs[1].Header
			off, n, _ := h.Piece(0, p)
			was := append([]byte(nil), f.reader.parts[h.ID][0][off:off+n]...)
			for i := range n {
				f.reader.parts[h.ID][0][off+i] = 0xff
			}
			_, err := Attend(context.Background(), f.reader, f.segs, f.query(rng, 0, 2), b, nil)
			if !errors.Is(err, tiers.ErrCorrupt) || f.reader.live.Load() != 0 {
				t.Errorf("%v: %v, %d pins", p, err, f.reader.live.Load())
			}
			copy(f.reader.parts[h.ID][0][off:], was)
		}
	}
}

// The trace tells of every read token once for each row, with its true place.
func TestTrace(t *testing.T) {
	rng := rand.New(rand.NewPCG(19, 20))
	s := newSample(rng, 2500, 1, 64)
	f := sealed(rng, s, seal.Options{Profile: tiers.ProfileNeutral}, compress.F32, 2048, 2500)
	for _, b := range []Budget{{All: true}, {Share: .3}, {Share: .3, ByPage: true}} {
		q := f.query(rng, 0, 2)
		seen, off := make(map[string]How), 0.
		tr := &Trace{Token: func(row, segment, place int, log float32, how How) {
			key := fmt.Sprint(row, segment, place)
			if _, twice := seen[key]; twice {
				t.Fatalf("token %s twice", key)
			}
			seen[key] = how
			at, n, _ := f.segs[segment].Header.Piece(0, tiers.PlaneOrder)
			order := view(f.segs[segment], 0).Positions(f.reader.parts[f.segs[segment].Header.ID][0][at : at+n])
			pos := order[place] + int(f.segs[segment].Header.Start)
			want := attention.Dot(q.Q[row*s.d:(row+1)*s.d], s.k[pos*s.d:(pos+1)*s.d])
			if how == Read {
				off += math.Abs(float64(log - want))
			}
		}}
		acc, err := Attend(context.Background(), f.reader, f.segs, q, b, tr)
		if err != nil {
			t.Fatal(err)
		}
		count := make(map[How]int64)
		for _, how := range seen {
			count[how]++
		}
		if off /= float64(count[Read]); off > 1 { // a tenth of what it is for tokens of other places
			t.Errorf("%+v: log weights are off by %v on average", b, off)
		}
		if count[Read] != 2*acc.Read || count[Read]+count[Scanned] != 2*acc.Scanned {
			t.Errorf("%+v: traced %v, account %d read, %d scanned", b, count, acc.Read, acc.Scanned)
		}
	}
}

func TestAccountAdd(t *testing.T) {
	a := Account{Read: 1, Error: .2, errorRows: 3, codecSum: .1, codecNo: 1, Moved: tiers.Moved{RAM: 5}}
	a.Add(Account{Read: 2, Error: .6, errorRows: 1, codecSum: .3, codecNo: 1, Moved: tiers.Moved{RAM: 6, NVMe: 1}})
	if a.Read != 3 || math.Abs(float64(a.Error)-.3) > 1e-6 || math.Abs(float64(a.Codec)-.2) > 1e-6 || a.Moved != (tiers.Moved{RAM: 11, NVMe: 1}) {
		t.Errorf("%+v", a)
	}
}

func BenchmarkAttend(b *testing.B) {
	rng := rand.New(rand.NewPCG(21, 22))
	for _, d := range []int{64, 128, 256} {
		f := sealed(rng, newSample(rng, 4096, 1, d), seal.Options{Profile: tiers.ProfileBalanced}, compress.BF16, 2048, 4096)
		q := f.query(rng, 0, 3)
		for name, budget := range map[string]Budget{"share.2": {Share: .2}, "all": {All: true}} {
			b.Run(fmt.Sprintf("d%d/%s", d, name), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					q.Partials = attention.NewPartials(3, d)
					if _, err := Attend(context.Background(), f.reader, f.segs, q, budget, nil); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
