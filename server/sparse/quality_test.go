package sparse

import (
	"archive/zip"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"kvtier/attention"
	"kvtier/compress"
	"kvtier/tiers"
	"kvtier/tiers/seal"
)

// dump is one layer of a real model: q [n][heads*group][d], k and v [n][heads][d], after RoPE, q not scaled.
type dump struct {
	sample
	q     []float32
	group int
}

// readDump reads a .npz of q, k and v, stored uncompressed, float32.
func readDump(file string) (*dump, error) {
	z, err := zip.OpenReader(file)
	if err != nil {
		return nil, err
	}
	defer z.Close()
	array := func(name string) (x []float32, shape [3]int, err error) {
		f, err := z.Open(name + ".npy")
		if err != nil {
			return nil, shape, err
		}
		b, err := io.ReadAll(f)
		if err != nil {
			return nil, shape, err
		}
		head := 10 + int(binary.LittleEndian.Uint16(b[8:]))
		_, at, _ := strings.Cut(string(b[10:head]), "'shape': ")
		if _, err := fmt.Sscanf(at, "(%d, %d, %d)", &shape[0], &shape[1], &shape[2]); err != nil {
			return nil, shape, err
		}
		x = make([]float32, (len(b)-head)/4)
		compress.ToFloat32(x, b[head:], compress.F32)
		return x, shape, nil
	}
	d := &dump{}
	q, qs, err := array("q")
	if err != nil {
		return nil, err
	}
	k, ks, err := array("k")
	if err != nil {
		return nil, err
	}
	v, _, err := array("v")
	if err != nil {
		return nil, err
	}
	scale := float32(1 / math.Sqrt(float64(ks[2])))
	for i := range q {
		q[i] *= scale
	}
	d.sample = sample{ks[0], ks[1], ks[2], k, v}
	d.q, d.group = q, qs[1]/ks[1]
	return d, nil
}

// queries returns the scaled queries of one group at positions lo, lo+step ... below hi: [rows][d].
func (d *dump) queries(head, lo, hi, step int) []float32 {
	var out []float32
	w := d.group * d.d
	for t := lo; t < hi; t += step {
		at := (t*d.heads + head) * w
		out = append(out, d.q[at:at+w]...)
	}
	return out
}

// result sums up one budget.
type result struct {
	errs, estimated []float64
	moved, full     float64
	base            float64 // n*d: every key and value at 4 bits
	strong, unread  int
}

func (r *result) add(o *result) {
	r.errs, r.estimated = append(r.errs, o.errs...), append(r.estimated, o.estimated...)
	r.moved, r.full, r.base = r.moved+o.moved, r.full+o.full, r.base+o.base
	r.strong, r.unread = r.strong+o.strong, r.unread+o.unread
}

func (r *result) String() string {
	slices.Sort(r.errs)
	mean := func(x []float64) (s float64) {
		for _, e := range x {
			s += e / float64(len(x))
		}
		return s
	}
	return fmt.Sprintf("bytes/n*d %.3f  of 4-bit %.3f  error %.4f p95 %.3f p99 %.3f  estimated %.4f  strong %d unread %.1f%%",
		r.moved/r.base, r.moved/r.full, mean(r.errs), r.errs[len(r.errs)*95/100], r.errs[len(r.errs)*99/100], mean(r.estimated),
		r.strong, 100*float64(r.unread)/float64(max(1, r.strong)))
}

// sealedZone is where the sealed tokens end: 256 recent tokens before the first
// query stay exact or, if only full segments are to be sealed, up to 2,303.
func sealedZone(n, queries int) int {
	unit := tiers.PageTokens
	if os.Getenv("KVTIER_FULL") != "" {
		unit = tiers.SegmentTokens
	}
	return (n - queries - 256) / unit * unit
}

// TestQuality measures answers on dumps of real models, KVTIER_DUMPS being a
// folder of one .npz a layer: the last 256 positions ask, the first 16 and the
// recent 256 or more tokens are exact, all others sealed.
func TestQuality(t *testing.T) {
	dir := os.Getenv("KVTIER_DUMPS")
	if dir == "" {
		t.Skip("KVTIER_DUMPS is not set")
	}
	shares := []float32{.1, .15, .2, .3}
	if s := os.Getenv("KVTIER_SHARES"); s != "" {
		shares = nil
		for _, f := range strings.Split(s, ",") {
			x, err := strconv.ParseFloat(f, 32)
			if err != nil {
				t.Fatal(err)
			}
			shares = append(shares, float32(x))
		}
	}
	files, err := filepath.Glob(filepath.Join(dir, "L*.npz"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no dumps in %s: %v", dir, err)
	}
	every, step := envInt("KVTIER_LAYERS", 1), envInt("KVTIER_STEP", 4)
	codes := os.Getenv("KVTIER_CODES") != ""
	var mu sync.Mutex
	sum := make(map[string]*result)
	var names []string
	var wg sync.WaitGroup
	work := make(chan string)
	for range 2 {
		wg.Go(func() {
			for file := range work {
				d, err := readDump(file)
				if err != nil {
					t.Error(err)
					continue
				}
				for name, r := range measure(d, shares, step, codes) {
					mu.Lock()
					if sum[name] == nil {
						sum[name] = &result{}
						names = append(names, name)
					}
					sum[name].add(r)
					if testing.Verbose() && os.Getenv("KVTIER_BY_LAYER") != "" {
						fmt.Printf("%s %s: %v\n", filepath.Base(file), name, r)
					}
					mu.Unlock()
				}
			}
		})
	}
	for i := every - 1; i < len(files); i += every {
		work <- files[i]
	}
	close(work)
	wg.Wait()
	slices.Sort(names)
	for _, name := range names {
		fmt.Printf("%-10s %v\n", name, sum[name])
	}
}

func envInt(name string, otherwise int) int {
	if n, err := strconv.Atoi(os.Getenv(name)); err == nil {
		return n
	}
	return otherwise
}

// measure answers one layer's queries at every budget.
func measure(d *dump, shares []float32, step int, codes bool) map[string]*result {
	const queries = 256
	end := sealedZone(d.n, queries)
	reader := newMemReader()
	segments := func(profile tiers.Profile) (out []Segment) {
		for lo := 0; lo < end; lo += tiers.SegmentTokens {
			hi := min(lo+tiers.SegmentTokens, end)
			o := seal.Options{Profile: profile}
			if lo == 0 {
				o.Sinks = tiers.SinkTokens
			}
			for h := range d.heads {
				s := attention.NewQuerySum(d.d)
				s.Add(d.queries(h, lo, hi, 4))
				o.Metrics = append(o.Metrics, s.Metric())
			}
			out = append(out, reader.add(d.rows(lo, hi, compress.F32), o))
		}
		return out
	}
	budgets := make(map[string]Budget)
	for _, s := range shares {
		budgets[fmt.Sprintf("share %.2f", s)] = Budget{Share: s}
	}
	res := make(map[string]*result)
	d.ask(reader, segments(tiers.ProfileBalanced), budgets, res, end, queries, step)
	if codes {
		d.ask(reader, segments(tiers.ProfileBalanced), map[string]Budget{"k4v4": {All: true}}, res, end, queries, step)
		d.ask(reader, segments(tiers.ProfileNeutral), map[string]Budget{"k8v8": {All: true}}, res, end, queries, step)
	}
	return res
}

func (d *dump) ask(reader *memReader, segs []Segment, budgets map[string]Budget, res map[string]*result, end, queries, step int) {
	for head := range d.heads {
		k, v := d.head(d.k, head, 0, d.n), d.head(d.v, head, 0, d.n)
		position := make([][]int, len(segs))
		for i, s := range segs {
			off, n, _ := s.Header.Piece(head, tiers.PlaneOrder)
			position[i] = view(s, head).Positions(reader.parts[s.Header.ID][tiers.PartMain][off : off+n])
			for j := range position[i] {
				position[i][j] += int(s.Header.Start)
			}
		}
		scores := make([]float32, d.n)
		for pos := d.n - queries; pos < d.n; pos += step {
			q := d.queries(head, pos, pos+1, 1)
			exact, zone := attention.NewPartials(d.group, d.d), attention.NewPartials(d.group, d.d)
			attention.Attend(exact, q, k[:(pos+1)*d.d], v[:(pos+1)*d.d], d.d, 0, nil, scores)
			attention.Attend(zone, q, k[:tiers.SinkTokens*d.d], v[:tiers.SinkTokens*d.d], d.d, 0, nil, scores)
			attention.Attend(zone, q, k[end*d.d:(pos+1)*d.d], v[end*d.d:(pos+1)*d.d], d.d, 0, nil, scores)
			var strong [][2]int // row, position
			for r := range exact {
				for t := tiers.SinkTokens; t < end; t++ {
					s := attention.Dot(q[r*d.d:(r+1)*d.d], k[t*d.d:(t+1)*d.d])
					if math.Exp(float64(s-exact[r].LSE())) > .1 {
						strong = append(strong, [2]int{r, t})
					}
				}
			}
			for name, b := range budgets {
				if res[name] == nil {
					res[name] = &result{}
				}
				d.one(reader, segs, Query{Head: head, Q: q, Partials: clonePartials(zone)}, b, exact, position, strong, res[name])
			}
		}
	}
}

func clonePartials(ps []attention.Partial) []attention.Partial {
	out := slices.Clone(ps)
	for i := range out {
		out[i].Out = slices.Clone(out[i].Out)
	}
	return out
}

func (d *dump) one(reader *memReader, segs []Segment, q Query, b Budget, exact []attention.Partial, position [][]int, strong [][2]int, res *result) {
	read := make(map[int]bool)
	tr := &Trace{Token: func(row, segment, place int, _ float32, how How) {
		if how == Read {
			read[position[segment][place]] = true
		}
	}}
	acc, err := Attend(context.Background(), reader, segs, q, b, tr)
	if err != nil {
		panic(err)
	}
	want, got := make([]float32, d.d), make([]float32, d.d)
	for r := range exact {
		exact[r].Output(want)
		q.Partials[r].Output(got)
		res.errs = append(res.errs, float64(attention.RelativeError(got, want)))
	}
	for range exact {
		res.estimated = append(res.estimated, float64(acc.Error))
	}
	for _, s := range strong {
		res.strong++
		if !read[s[1]] {
			res.unread++
		}
	}
	res.moved += float64(acc.Moved.RAM)
	res.full += float64(acc.Full)
	for i := range segs {
		res.base += float64(view(segs[i], q.Head).Stored() * d.d)
	}
}

// TestStored measures what full segments of the dumps take, in bits a value:
// image, header and 64 bytes of location.
func TestStored(t *testing.T) {
	files, _ := filepath.Glob(filepath.Join(os.Getenv("KVTIER_DUMPS"), "L*.npz"))
	if os.Getenv("KVTIER_DUMPS") == "" {
		t.Skip("KVTIER_DUMPS is not set")
	}
	bytes, planes, values := make(map[tiers.Profile]float64), 0., 0.
	for i := 0; i < len(files); i += envInt("KVTIER_LAYERS", 1) {
		d, err := readDump(files[i])
		if err != nil {
			t.Fatal(err)
		}
		r := d.rows(0, tiers.SegmentTokens, compress.BF16)
		o := seal.Options{Sinks: tiers.SinkTokens}
		for h := range d.heads {
			s := attention.NewQuerySum(d.d)
			s.Add(d.queries(h, 0, tiers.SegmentTokens, 4))
			o.Metrics = append(o.Metrics, s.Metric())
		}
		for p := tiers.ProfileExact; p <= tiers.ProfileBalanced; p++ {
			o.Profile = p
			h, _ := seal.Segment(r, o)
			bytes[p] += float64(h.Bytes(tiers.PartMain) + h.Bytes(tiers.PartLow) + int64(len(h.Marshal())) + 64)
			for head := range h.Heads {
				for _, x := range []tiers.Plane{tiers.PlaneKX, tiers.PlaneVX} {
					if _, n, ok := h.Piece(head, x); ok {
						planes += float64(n)
					}
				}
			}
		}
		values += float64(2 * tiers.SegmentTokens * d.heads * d.d)
	}
	fmt.Printf("bits a value: balanced %.3f, neutral %.3f, exact %.3f, of them its lossless planes %.3f\n",
		8*bytes[tiers.ProfileBalanced]/values, 8*bytes[tiers.ProfileNeutral]/values, 8*bytes[tiers.ProfileExact]/values, 8*planes/values)
}
