package server

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/tiers"
	"kvtier/tiers/files"
)

// drawn is a synthetic call: its raw error, and the truth, which is raw times a
// factor of log-normal spread.
func drawn(rng *rand.Rand, median, spread float64) (raw, truth float32) {
	raw = float32(.02 * math.Exp(rng.NormFloat64()))
	return raw, raw * float32(median*math.Exp(spread*rng.NormFloat64()))
}

// Stated errors cover as many calls as they promise, once audits have come in,
// in layers that differ in factor and spread; before that the prior stands in.
func TestCalibrationCovers(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	c := newCalibration()
	key := modelKey{"m", 1}
	k := kindOf(budget{mode: kvtierv1.AttendMode_ATTEND_MODE_BUDGET}, .2)
	layers := []struct{ median, spread float64 }{{.4, .2}, {1, .5}, {3, .8}}
	const warm, n = 300, 3000
	var held, under [3]int
	for i := range warm + n {
		for l, x := range layers {
			raw, truth := drawn(rng, x.median, x.spread)
			s := c.state(key, l, k, raw)
			if i >= warm {
				if truth <= s.p95 {
					held[l]++
				}
				if truth <= s.estimate {
					under[l]++
				}
			}
			c.add(key, l, k, raw, s.p95, truth)
		}
	}
	for l := range layers {
		if share := float64(held[l]) / n; math.Abs(share-.95) > .02 {
			t.Errorf("layer %d: the 95th percentile held in %.3f of calls", l, share)
		}
		if share := float64(under[l]) / n; math.Abs(share-.5) > .05 {
			t.Errorf("layer %d: the middle estimate held in %.3f of calls", l, share)
		}
	}
	if s := c.state(key, 0, k, .1); s.audits != cellKept {
		t.Errorf("%d audits behind a statement, not the %d newest", s.audits, cellKept)
	}
	for _, l := range c.layers() {
		if l.Coverage < .92 || l.Audits != cellKept || l.Budget != "share 0.15-0.3" {
			t.Errorf("layer %d: %v", l.Layer, l)
		}
	}
}

// A layer that was never audited follows the model's other layers, and a model
// that drifts is followed.
func TestCalibrationPoolsAndForgets(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	c := newCalibration()
	key, k := modelKey{"m", 1}, kind(2)
	before := c.state(key, 7, k, .1)
	if before.audits != 0 || before.p95 <= before.estimate || before.estimate <= 0 {
		t.Fatalf("without an audit: %+v", before)
	}
	feed := func(median float64, n int) {
		for range n {
			raw, truth := drawn(rng, median, .2)
			c.add(key, 0, k, raw, 1, truth)
		}
	}
	feed(4, 200)
	if s := c.state(key, 7, k, .1); s.audits != 0 || s.estimate < .25 {
		t.Errorf("a layer without audits, beside one that errs 4 times its raw error: %+v", s)
	}
	if s := c.state(modelKey{"other", 1}, 7, k, .1); s != before {
		t.Errorf("another model: %+v, not %+v", s, before)
	}
	feed(.5, cellKept)
	if s := c.state(key, 0, k, .1); s.estimate > .06 {
		t.Errorf("after drift from 4 to .5: %+v", s)
	}
}

// The quantile is the (n+1)p-th value, and the largest where there are too few.
func TestConformalRank(t *testing.T) {
	values := func(n int) (out []weighted) {
		for i := range n {
			out = append(out, weighted{float64(i + 1), 1})
		}
		return out
	}
	for _, x := range []struct {
		n    int
		want float64
	}{{1, 1}, {18, 18}, {19, 19}, {20, 19.95}, {39, 38}, {50, 48.45}, {99, 95}, {199, 190}} {
		if got := quantile(values(x.n), .95); math.Abs(got-x.want) > 1e-6 {
			t.Errorf("of %d values: %v, not %v", x.n, got, x.want)
		}
	}
}

// Clients cannot make the daemon keep models without end.
func TestCalibrationBounded(t *testing.T) {
	c := newCalibration()
	for i := range 3 * maxModels {
		c.add(modelKey{string(rune(i)), 1}, 0, 0, .1, .1, .1)
		c.add(modelKey{"kept", 1}, 0, 0, .1, .1, .1)
	}
	if n := len(c.mu.models); n != maxModels {
		t.Errorf("%d models kept, not %d", n, maxModels)
	}
	if c.mu.models[modelKey{"kept", 1}] == nil {
		t.Error("the model in use was forgotten")
	}
}

func TestKinds(t *testing.T) {
	names := map[string]bool{}
	for k := range kind(numKinds) {
		if len(prior[k]) == 0 {
			t.Errorf("kind %v has no prior", k)
		}
		names[k.String()] = true
	}
	if got := kindOf(budget{}, .1).ofPages().String(); got != "share by page 0.075-0.15" {
		t.Errorf("a call by page is of kind %s", got)
	}
	if got := kindOf(budget{}, .1).onDevice().String(); len(names) != numKinds || got != "share on a GPU 0.075-0.15" {
		t.Errorf("%d names of %d kinds, %s", len(names), numKinds, got)
	}
	for _, x := range []struct {
		b     budget
		share float32
		want  string
	}{
		{budget{}, .05, "share 0-0.075"}, {budget{}, .1, "share 0.075-0.15"}, {budget{}, .2, "share 0.15-0.3"}, {budget{}, 1, "share 0.5-1"},
		{budget{mode: kvtierv1.AttendMode_ATTEND_MODE_TARGET, target: .01}, 1, "target 0-0.02"},
		{budget{mode: kvtierv1.AttendMode_ATTEND_MODE_TARGET, target: .5}, 1, "target 0.1-1"},
	} {
		if got := kindOf(x.b, x.share).String(); got != x.want {
			t.Errorf("%+v, share %v: %s, not %s", x.b, x.share, got, x.want)
		}
	}
}

// What audits taught outlives the daemon; a damaged file is no more than a loss.
func TestCalibrationOutlivesTheDaemon(t *testing.T) {
	dir := t.TempDir()
	rng := rand.New(rand.NewPCG(5, 6))
	key := modelKey{"\xff\x00model", 3}
	c := newCalibration()
	pages := kind(2).ofPages()
	for range 2 * savedRatios {
		raw, truth := drawn(rng, 4, .2)
		c.add(key, 3, 2, raw, 1, truth)
		c.add(key, 3, pages, raw, 1, truth)
		c.addHead(key, 3, 1, raw, truth)
	}
	if err := c.save(files.OS, dir); err != nil {
		t.Fatal(err)
	}
	again := newCalibration()
	if err := again.load(files.OS, dir); err != nil {
		t.Fatal(err)
	}
	was, is := c.state(key, 3, 2, .02), again.state(key, 3, 2, .02)
	if is.audits != savedRatios || math.Abs(float64(is.p95/was.p95-1)) > .15 {
		t.Errorf("stated %+v, after a restart %+v", was, is)
	}
	if a, b := c.headBias(key, 3, 1), again.headBias(key, 3, 1); a != b || a == 0 {
		t.Errorf("a head's bias %v, after a restart %v", a, b)
	}
	path := filepath.Join(dir, calibrationFile)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// Of another estimate of errors, ratios are left out; others are not.
	number := []byte(fmt.Sprintf(`"Estimate":%d,`, pages.estimate()))
	if !bytes.Contains(b, number) || again.state(key, 3, pages, .02).audits != savedRatios {
		t.Fatalf("no %s in %s", number, b)
	}
	older := bytes.ReplaceAll(b[:len(b)-4], number, nil)
	older = binary.LittleEndian.AppendUint32(older, crc32.ChecksumIEEE(older))
	if err := os.WriteFile(path, older, 0o600); err != nil {
		t.Fatal(err)
	}
	again = newCalibration()
	if err := again.load(files.OS, dir); err != nil {
		t.Fatal(err)
	}
	if n, m := again.state(key, 3, pages, .02).audits, again.state(key, 3, 2, .02).audits; n != 0 || m != savedRatios {
		t.Errorf("%d audits of another estimate count, and %d of this one", n, m)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := newCalibration().load(files.OS, dir); !errors.Is(err, tiers.ErrCorrupt) {
		t.Errorf("a damaged file: %v", err)
	}
	openServer(t, dir, Options{}) // and still it opens
}
