package seal

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"kvtier/attention"
	"kvtier/attention/kernels"
	"kvtier/compress"
	"kvtier/tiers"
)

// madeUp returns rows of a kind that repeats on every platform: sums of
// integers, by channel on another scale and bias.
func madeUp(n, heads, d int, t compress.ElementType) *Rows {
	state := uint32(n*31 + heads*7 + d)
	next := func() (sum int) {
		for range 4 {
			state = state*1664525 + 1013904223
			sum += int(state >> 24)
		}
		return sum - 510
	}
	r := &Rows{Layer: 3, Start: 4096, Heads: heads, HeadDim: d, Type: t}
	for _, b := range []*[]byte{&r.K, &r.V} {
		x := make([]float32, n*heads*d)
		for i := range x {
			j := i % d
			x[i] = float32(next()<<(j%3)+(j*j%97-48)*32) / 1024
		}
		*b = make([]byte, len(x)*t.Size())
		compress.FromFloat32(*b, x, t)
	}
	return r
}

func metrics(heads, d int) []*attention.Metric {
	out := make([]*attention.Metric, heads)
	for h := range out {
		out[h] = querySum(h, d).Metric()
	}
	return out
}

func querySum(head, d int) *attention.QuerySum {
	s := attention.NewQuerySum(d)
	q := make([]float32, 2*d*d)
	for i := range q {
		q[i] = float32((i*i+head)%17-8) / 16
	}
	s.Add(q)
	return s
}

// head returns one head's rows, as float32 [tokens][d].
func (r *Rows) head(b []byte, head, lo, hi int) []float32 {
	x := make([]float32, (hi-lo)*r.HeadDim)
	compress.ToFloat32(x, headBytes(r, b, head, lo, hi), r.Type)
	return x
}

// Segments of every shape come back, each key and value within its code's error.
func TestSegment(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	profiles := []tiers.Profile{tiers.ProfileExact, tiers.ProfileNeutral, tiers.ProfileBalanced}
	types := []compress.ElementType{compress.F32, compress.BF16, compress.F16}
	for d := 16; d <= 256; d += 16 {
		for i, n := range []int{1, 15, 64, 255, 256, 257, 1 + rng.IntN(600), 2048} {
			if n == 2048 && d != 64 && d != 256 {
				continue
			}
			o := Options{Profile: profiles[(d/16+i)%3], Low: i%2 == 0}
			if n > 16 && i%3 == 0 {
				o.Sinks = tiers.SinkTokens
			}
			r := madeUp(n, 1+i%2, d, types[i%3])
			t.Run(fmt.Sprintf("d%d/n%d/%v/profile%d", d, n, r.Type, o.Profile), func(t *testing.T) { segment(t, r, o) })
		}
	}
}

func segment(t *testing.T, r *Rows, o Options) {
	d, n := r.HeadDim, r.Tokens()
	o.Metrics = metrics(r.Heads, d)
	h, parts := Segment(r, o)
	if err := Check(h); err != nil {
		t.Fatal(err)
	}
	if again, _ := Segment(r, o); again.ID != h.ID {
		t.Fatal("sealing is not repeatable")
	}
	for head := range r.Heads {
		v := View{D: d, Info: h.Heads[head]}
		of := func(p tiers.Plane) []byte { return piece(h, parts, head, p) }
		if v.Stored()+o.Sinks != n || v.Info.Sinks != o.Sinks {
			t.Fatalf("%d stored and %d sinks of %d", v.Stored(), v.Info.Sinks, n)
		}
		k, val := r.head(r.K, head, 0, n), r.head(r.V, head, 0, n)
		order := v.Positions(of(tiers.PlaneOrder))
		sorted := slices.Clone(order)
		slices.Sort(sorted)
		for i, pos := range sorted {
			if pos != i+o.Sinks {
				t.Fatal("positions are no permutation")
			}
		}
		want := append(headBytes(r, r.K, head, 0, o.Sinks), headBytes(r, r.V, head, 0, o.Sinks)...)
		if !bytes.Equal(of(tiers.PlaneSinks), want) {
			t.Fatal("sinks differ")
		}
		low := o.Low || o.Profile == tiers.ProfileNeutral
		if (of(tiers.PlaneK8) != nil) != (low && d > 16) || (of(tiers.PlaneV8) != nil) != low {
			t.Fatal("low planes")
		}
		gk, gv := make([]float32, v.Stored()*d), make([]float32, v.Stored()*d)
		for _, bits := range []int{4, 8} {
			if bits == 8 && !low {
				continue
			}
			have := of
			if bits == 4 {
				have = WithoutLow(of)
			}
			if err := v.Keys(gk, have); err != nil {
				t.Fatal(err)
			}
			v.Values(gv, have)
			compress.Unrotate(gv, d)
			within(t, gk, k, order, order, d, map[int]int{4: 2, 8: 8}[bits]) // of a channel that counts little, 2 bits
			valuesWithin(t, gv, val, order, d, bits)
			drainsWithin(t, v, gk, gv, k, val, order)
		}
		if o.Profile == tiers.ProfileExact {
			exact(t, of(tiers.PlaneKX), headBytes(r, r.K, head, o.Sinks, n), v.Stored(), d, r.Type)
			exact(t, of(tiers.PlaneVX), headBytes(r, r.V, head, o.Sinks, n), v.Stored(), d, r.Type)
		}
		summaries(t, v, k, order, of)
	}
}

// drainsWithin checks that drains have 8 bits whatever planes there are.
func drainsWithin(t *testing.T, v View, gk, gv, k, val []float32, order []int) {
	t.Helper()
	lo, hi := v.Info.Body, v.Info.Body+v.Drains()
	if lo == hi {
		return
	}
	within(t, gk[lo*v.D:hi*v.D], k, order[lo:hi], order[lo:], v.D, 8)
	valuesWithin(t, gv[lo*v.D:hi*v.D], val, order[lo:hi], v.D, 8)
}

// within: keys lie within half a bin of their channel's range, or two 8-bit bins more, as channels make up for the errors of others.
func within(t *testing.T, got, want []float32, order, span []int, d, bits int) {
	t.Helper()
	for j := range d {
		lo, hi := want[span[0]*d+j], want[span[0]*d+j]
		for _, pos := range span {
			lo, hi = min(lo, want[pos*d+j]), max(hi, want[pos*d+j])
		}
		// Steps are rounded up to binary16 after lower ends are rounded down.
		half := map[int]float64{2: .51 + .11*1.5, 8: .51}[bits] // of a bin; 2-bit midpoints are drawn to the centre
		half += 2 * float64(int(1)<<bits) / 256
		limit := float64(hi-lo)/float64(int(1)<<bits)*half + 2e-3*float64(hi-lo) + 2e-3*math.Abs(float64(lo)) + 1e-9
		for place, pos := range order {
			if e := math.Abs(float64(got[place*d+j] - want[pos*d+j])); e > limit {
				t.Fatalf("%d bits: key %d, dim %d is off by %v, more than %v", bits, pos, j, e, limit)
			}
		}
	}
}

// valuesWithin: values err by no more than half a bin in any rotated channel.
func valuesWithin(t *testing.T, got, want []float32, order []int, d, bits int) {
	t.Helper()
	for place, pos := range order {
		row := want[pos*d : (pos+1)*d]
		rot := slices.Clone(row)
		compress.Rotate(rot, d)
		lo, hi := min(0, slices.Min(rot)), max(0, slices.Max(rot))
		limit := float64(hi-lo) / float64(int(1)<<bits) * .52 * math.Sqrt(float64(d))
		var e2 float64
		for j, x := range row {
			e := float64(got[place*d+j] - x)
			e2 += e * e
		}
		if math.Sqrt(e2) > limit {
			t.Fatalf("%d bits: value %d is off by %v, more than %v", bits, pos, math.Sqrt(e2), limit)
		}
	}
}

func exact(t *testing.T, packed, want []byte, n, d int, typ compress.ElementType) {
	t.Helper()
	got, row := make([]byte, len(want)), d*typ.Size()
	for p := range compress.ExactPages(n) {
		if err := compress.UnpackExactPage(got[p*tiers.PageTokens*row:min((p+1)*tiers.PageTokens, n)*row], packed, p, n, d, typ); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(got, want) {
		t.Fatal("exact rows differ")
	}
}

// summaries: pages' means stand for the tokens that lie in them.
func summaries(t *testing.T, v View, k []float32, order []int, of func(tiers.Plane) []byte) {
	t.Helper()
	q := make([]float32, v.D)
	for j := range q {
		q[j] = float32(j%5 - 2)
	}
	var size float32
	for _, x := range k {
		size = max(size, float32(math.Abs(float64(x))))
	}
	var means PageMeans
	if err := v.PageMeans(&means, of(tiers.PlanePages)); err != nil || means.Keys.Len() != v.Pages() || means.Values.Units() != v.Pages() {
		t.Fatalf("page means: %v", err)
	}
	places := compress.MeanKeyPlaces(v.Pages())
	seen, scores := 0, make([]float32, places)
	steps := compress.NewKeySteps(v.D)
	if err := errors.Join(means.Keys.ReadSteps(steps), means.Keys.Scores(scores, places, q, kernels.KeyQuery{Words: make([]int16, v.D), Scale: make([]float32, 2)})); err != nil {
		t.Fatal(err)
	}
	noise := make([]float32, v.D) // half a bin of 16 of a channel
	for j := range noise {
		noise[j] = 8*steps.Step[j] + size/(1<<14)
	}
	for p := range v.Pages() {
		first, n := p*tiers.PageTokens, v.PageTokens(p)
		var want float32
		for _, pos := range order[first : first+n] {
			want += attention.Dot(q, k[pos*v.D:(pos+1)*v.D]) / float32(n)
		}
		var most float32
		for j, x := range q {
			most += float32(math.Abs(float64(x))) * noise[j]
		}
		if float32(math.Abs(float64(scores[p]-want))) > most {
			t.Fatalf("page %d: mean score %v, want %v, at most %v apart", p, scores[p], want, most)
		}
		if v.Outliers(p) != (first >= v.Info.Body) {
			t.Fatalf("page %d of outliers: %v", p, v.Outliers(p))
		}
		a, b := v.LeavesOf(p)
		for l := a; l < b; l++ {
			lo, hi := v.GroupPlaces(v.StepGroup(l))
			if at := l * tiers.LeafTokens; at < lo || at+v.LeafTokens(l) > hi {
				t.Fatalf("leaf %d is not in its group of steps", l)
			}
			seen += v.LeafTokens(l)
		}
	}
	if seen != v.Stored() {
		t.Fatalf("leaves hold %d tokens of %d", seen, v.Stored())
	}
}

func TestWindow(t *testing.T) {
	for _, n := range []int{1, 100, 512} {
		r := madeUp(n, 3, 80, compress.BF16)
		h, parts := Window(r, tiers.ProfileBalanced, 2048, 2048)
		if err := Check(h); err != nil {
			t.Fatal(err)
		}
		for head := range 3 {
			want := append(headBytes(r, r.K, head, 0, n), headBytes(r, r.V, head, 0, n)...)
			if !bytes.Equal(piece(h, parts, head, tiers.PlaneWindow), want) {
				t.Fatal("the window differs")
			}
		}
		if back, err := tiers.UnmarshalHeader(h.Marshal()); err != nil || Check(back) != nil {
			t.Fatal(err)
		}
	}
}

// The codec's error is small, not zero, and no NaN for rows that are all alike.
func TestCodecError(t *testing.T) {
	const d, n = 64, 512
	rng := rand.New(rand.NewPCG(3, 4))
	q := make([]float32, 8*d)
	for i := range q {
		q[i] = float32(rng.NormFloat64()) / 4
	}
	o := Options{Profile: tiers.ProfileBalanced, Metrics: metrics(1, d), Queries: [][]float32{q}}
	h, _ := Segment(madeUp(n, 1, d, compress.F32), o)
	if e := h.Heads[0].CodecError; !(e > 1e-4 && e < .2) {
		t.Errorf("codec error %v", e)
	}
	flat := &Rows{Heads: 1, HeadDim: d, Type: compress.F32, K: make([]byte, 4*n*d), V: make([]byte, 4*n*d)}
	h, _ = Segment(flat, o)
	if err := Check(h); err != nil || h.Heads[0].CodecError != 0 {
		t.Errorf("all zero: codec error %v, %v", h.Heads[0].CodecError, err)
	}
}

// Check refuses every plane of another size, every count that does not fit.
func TestCheck(t *testing.T) {
	refused := func(name string, h *tiers.Header) {
		t.Helper()
		if err := Check(h); !errors.Is(err, tiers.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, profile := range []tiers.Profile{tiers.ProfileExact, tiers.ProfileNeutral, tiers.ProfileBalanced} {
		r := madeUp(300, 2, 32, compress.BF16)
		h, parts := Segment(r, Options{Profile: profile, Sinks: 16, Metrics: metrics(2, 32)})
		pieces := make([][tiers.NumPlanes][]byte, 2)
		for _, p := range h.Pieces(parts) {
			pieces[p.Head][p.Plane] = p.Bytes
		}
		rebuilt := func() *tiers.Header {
			x := *h
			x.Heads = slices.Clone(h.Heads)
			out, _ := tiers.NewHeader(x, pieces)
			return out
		}
		if err := Check(rebuilt()); err != nil {
			t.Fatal(err)
		}
		for p := range tiers.NumPlanes {
			was := pieces[1][p]
			pieces[1][p] = append(slices.Clone(was), make([]byte, 1<<16)...)
			refused(fmt.Sprintf("profile %d, %v too long", profile, p), rebuilt())
			if len(was) > 0 {
				pieces[1][p] = was[:1]
				refused(fmt.Sprintf("profile %d, %v too short", profile, p), rebuilt())
				pieces[1][p] = nil
				refused(fmt.Sprintf("profile %d, %v absent", profile, p), rebuilt())
			}
			pieces[1][p] = was
		}
		for name, change := range map[string]func(h *tiers.Header){
			"type":      func(h *tiers.Header) { h.Type = 9 },
			"dimension": func(h *tiers.Header) { h.HeadDim = 40 },
			"tokens":    func(h *tiers.Header) { h.Tokens++ },
			"body":      func(h *tiers.Header) { h.Heads[1].Body -= 16; h.Heads[1].Outliers += 16 },
			"no body":   func(h *tiers.Header) { h.Heads[1].Outliers += h.Heads[1].Body; h.Heads[1].Body = 0 },
			"sinks":     func(h *tiers.Header) { h.Heads[1].Sinks--; h.Heads[1].Body++ },
			"NaN":       func(h *tiers.Header) { h.Heads[1].CodecError = float32(math.NaN()) },
		} {
			x := rebuilt()
			change(x)
			refused(name, x)
		}
	}
	h, _ := Window(madeUp(20, 2, 32, compress.BF16), tiers.ProfileExact, 0, 20)
	h.Heads[1].Sinks = 1
	refused("a window with sinks", h)
}

// What passes Check can be read without a panic, whatever the planes hold.
func FuzzCheck(f *testing.F) {
	h, _ := Segment(madeUp(300, 1, 16, compress.BF16), Options{Profile: tiers.ProfileBalanced, Metrics: metrics(1, 16), Low: true})
	f.Add(h.Marshal(), uint64(1))
	f.Fuzz(func(t *testing.T, b []byte, seed uint64) {
		h, err := tiers.UnmarshalHeader(b)
		if err != nil || Check(h) != nil || h.Bytes(0) > 1<<22 || h.Bytes(1) > 1<<22 {
			return
		}
		rng := rand.New(rand.NewPCG(seed, 0))
		var parts [tiers.NumParts][]byte
		for p := range parts {
			parts[p] = make([]byte, h.Bytes(tiers.Part(p)))
			for i := range parts[p] {
				parts[p][i] = byte(rng.Uint32())
			}
		}
		for head := range h.Heads {
			of := func(p tiers.Plane) []byte { return piece(h, parts, head, p) }
			v := View{D: h.HeadDim, Info: h.Heads[head]}
			if of(tiers.PlaneWindow) != nil {
				continue
			}
			v.Positions(of(tiers.PlaneOrder))
			x := make([]float32, v.Stored()*v.D)
			_ = v.Keys(x, of)
			v.Values(x, of)
		}
	})
}

func BenchmarkSegment(b *testing.B) {
	for _, c := range []struct{ heads, d int }{{3, 64}, {1, 256}, {1, 128}} {
		b.Run(fmt.Sprintf("heads%d/d%d", c.heads, c.d), func(b *testing.B) {
			r, m := madeUp(2048, c.heads, c.d, compress.BF16), metrics(c.heads, c.d)
			for b.Loop() {
				Segment(r, Options{Profile: tiers.ProfileBalanced, Metrics: m})
			}
		})
		// With a metric made anew, and the codec measured on 16 queries.
		b.Run(fmt.Sprintf("heads%d/d%d/asked", c.heads, c.d), func(b *testing.B) {
			r, sum, queries := madeUp(2048, c.heads, c.d, compress.BF16), querySum(0, c.d), make([]float32, 16*c.d)
			for i := range queries {
				queries[i] = float32(i*i%17-8) / 16
			}
			for b.Loop() {
				o := Options{Profile: tiers.ProfileBalanced}
				for range c.heads {
					o.Metrics, o.Queries = append(o.Metrics, sum.Metric()), append(o.Queries, queries)
				}
				Segment(r, o)
			}
		})
	}
}

// Bits a value, with everything that a full segment takes on disk and in the catalogue.
func TestBitsPerValue(t *testing.T) {
	const location = 64
	for _, c := range []struct {
		heads, d int
		profile  tiers.Profile
		limit    float64
	}{
		{3, 64, tiers.ProfileBalanced, 5.25}, {8, 128, tiers.ProfileBalanced, 5}, {1, 256, tiers.ProfileBalanced, 5},
		{3, 64, tiers.ProfileNeutral, 9.25}, {8, 128, tiers.ProfileNeutral, 9.25}, {1, 256, tiers.ProfileNeutral, 9.25},
	} {
		r := madeUp(2048, c.heads, c.d, compress.BF16)
		h, _ := Segment(r, Options{Profile: c.profile, Metrics: metrics(c.heads, c.d)})
		bytes := h.Bytes(tiers.PartMain) + h.Bytes(tiers.PartLow) + int64(len(h.Marshal())) + location
		bits := float64(bytes) * 8 / float64(2*2048*c.heads*c.d)
		t.Logf("%d heads x d %d, profile %d: %.3f bits a value", c.heads, c.d, c.profile, bits)
		if bits > c.limit {
			t.Errorf("%d heads x d %d, profile %d: %.3f bits a value, more than %v", c.heads, c.d, c.profile, bits, c.limit)
		}
	}
}

// headBytes returns one head's elements of tokens [lo, hi).
func headBytes(r *Rows, b []byte, head, lo, hi int) []byte {
	row := r.HeadDim * r.Type.Size()
	return r.appendHead(nil, b, head)[lo*row : hi*row : hi*row]
}
