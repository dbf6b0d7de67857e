package crash

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	kvtierv1 "kvtier/proto/kvtier/v1"
)

var (
	kills   = flag.Int("kills", 6, "how often a daemon is killed")
	folders = flag.Int("folders", 2, "how many daemons work at once, each on its own folder")
	seed    = flag.Uint64("seed", 1, "what the workload follows from")
	keep    = flag.Bool("keep", false, "keep the folders, or what a power cut left")
)

const workers = 3

// harness kills and restarts the daemon of one data folder.
type harness struct {
	bin, dir string
	number   int
	workers  []*worker
	starts   int // kills during recovery
}

func TestCrash(t *testing.T) {
	if testing.Short() {
		*kills = min(*kills, 3)
	}
	dir, err := os.MkdirTemp("", "kvcrash") // short: a socket's path is
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if *keep {
			t.Logf("kept %s", dir)
		} else if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	bin := build(t, dir)
	begin := time.Now()
	var g errgroup.Group
	var all []*harness
	for f := range *folders {
		h := &harness{bin: bin, dir: filepath.Join(dir, strconv.Itoa(f)), number: f}
		if err := os.Mkdir(h.dir, 0o700); err != nil {
			t.Fatal(err)
		}
		for i := range workers {
			h.workers = append(h.workers, &worker{number: i, size: size{sequences: 4, tokens: 2600, bulk: 300, segment: 2300}, specs: specs(), deleted: map[string]bool{}})
		}
		all = append(all, h)
		g.Go(func() error {
			for n := f; n < *kills; n += *folders {
				if err := h.round(t.Context(), n); err != nil {
					return fmt.Errorf("kill %d of seed %d, folder %d: %w", n, *seed, f, err)
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	var sum tally
	starts := 0
	for _, h := range all {
		for _, w := range h.workers {
			sum.add(w.tally)
		}
		starts += h.starts
	}
	fmt.Printf("crash: %d kills (%d more while recovering) of %d daemons, %d positions acknowledged, %d lost, %d answers checked, %d wrong, "+
		"%d rows read back, %d wrong; %d operations, %d flushes, %d forks; seed %d, %v\n",
		*kills, starts, *folders, sum.acked, sum.lost, sum.answers, sum.wrong, sum.rows, sum.wrongRows, sum.ops, sum.seals, sum.forks, *seed, time.Since(begin).Round(time.Second))
	if sum.lost > 0 || sum.wrong > 0 || sum.wrongRows > 0 {
		t.Fail()
	}
}

// round starts the daemon, checks all that it acknowledged before, lets the
// workers go on, and kills it.
func (h *harness) round(ctx context.Context, n int) error {
	rng := rand.New(rand.NewPCG(*seed, uint64(n)))
	for rng.IntN(4) == 0 { // die while recovering
		p, err := start(h.bin, h.dir)
		if err != nil {
			return err
		}
		time.Sleep(time.Duration(rng.IntN(60)) * time.Millisecond)
		p.Kill()
		h.starts++
	}
	p, err := start(h.bin, h.dir)
	if err != nil {
		return err
	}
	defer p.Kill()
	if err := p.ready(ctx); err != nil {
		return err
	}
	if err := check(ctx, p.clients, h.workers, n, n%10 < *folders); err != nil {
		p.Kill()
		return fmt.Errorf("%w\n%s", err, p.log)
	}
	timer := time.AfterFunc(time.Duration(10+rng.IntN(200))*time.Millisecond, p.Kill)
	defer timer.Stop()
	var g errgroup.Group
	for i, w := range h.workers {
		w.p, w.rng = p.clients, rand.New(rand.NewPCG(*seed, uint64(n)<<8|uint64(i)+1))
		g.Go(func() error { return w.run(ctx) })
	}
	if err := g.Wait(); err != nil {
		p.Kill()
		return fmt.Errorf("%w\n%s", err, p.log)
	}
	p.Kill()
	if bytes.Contains(p.log.Bytes(), []byte("panic")) || bytes.Contains(p.log.Bytes(), []byte("level=ERROR")) {
		return fmt.Errorf("the daemon complained:\n%s", p.log)
	}
	return nil
}

// check holds the daemon to what it acknowledged before it crashed for the n-th
// time. If whole is set, it reads every stored byte.
func check(ctx context.Context, p clients, workers []*worker, n int, whole bool) error {
	list, err := p.look.ListSequences(ctx, &kvtierv1.ListSequencesRequest{})
	if err != nil {
		return err
	}
	there := map[string]*kvtierv1.SequenceInfo{}
	byName := map[string]*kvtierv1.SequenceInfo{}
	for _, s := range list.Sequences {
		there[s.SequenceId], byName[s.Name] = s, s
		if l := workers[0].lies; s.Damage != "" && !l.extents && !l.logs[s.SequenceId] {
			return fmt.Errorf("%s is damaged: %s", s.Name, s.Damage)
		}
	}
	known := 0
	var g errgroup.Group
	for _, w := range workers {
		w.p = p
		for id := range w.deleted {
			if there[id] != nil {
				return fmt.Errorf("sequence %s was deleted and is back", id)
			}
		}
		if err := w.settle(ctx, there, byName); err != nil {
			return err
		}
		known += len(w.seqs)
		g.Go(func() error { return w.checkAll(ctx, n) })
	}
	if known != len(list.Sequences) {
		return fmt.Errorf("there are %d sequences, the workers know %d", len(list.Sequences), known)
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if whole && !workers[0].lying {
		return verify(ctx, p)
	}
	return nil
}

// settle finds out what became of calls that a crash cut off, and that nothing
// acknowledged is gone.
func (w *worker) settle(ctx context.Context, there, byName map[string]*kvtierv1.SequenceInfo) error {
	for _, s := range append([]*sequence(nil), w.seqs...) {
		info := there[s.id]
		if s.making {
			info = byName[s.name]
		}
		if info == nil {
			if !s.making && !s.deleting {
				w.lost += s.safe
				return fmt.Errorf("%s is gone, with %d positions", s.name, s.safe)
			}
			w.forget(s)
			continue
		}
		got := info.Ack.Accepted
		if s.making && got != uint64(len(s.tokens)) && !w.lies.logs[info.SequenceId] {
			return fmt.Errorf("%s was forked at %d and has %d positions", s.name, len(s.tokens), got)
		}
		s.id, s.making, s.deleting = info.SequenceId, false, false
		if err := w.settleTokens(ctx, s, info.Ack); err != nil {
			return err
		}
		if err := w.acked(s, info.Ack); err != nil {
			return err
		}
	}
	return nil
}

// settleTokens finds out which tokens a sequence has.
func (w *worker) settleTokens(ctx context.Context, s *sequence, a *kvtierv1.Ack) error {
	// It may be as it was last, with some of an append that was under way, or
	// after a truncation that was under way, or before one that was not power-safe.
	states := append([]cut{{safe: s.safe, tokens: append(slices.Clip(s.tokens), s.appending...)}}, s.cuts...)
	if s.cutting {
		states = append(states, cut{safe: min(s.safe, uint64(s.cutTo)), tokens: s.tokens[:s.cutTo:s.cutTo]})
	}
	got := a.Accepted
	if w.lies.logs[s.id] {
		for i := range states {
			states[i].safe = 0
		}
	}
	states = slices.DeleteFunc(states, func(c cut) bool { return got < c.safe || got > uint64(len(c.tokens)) })
	switch {
	case len(states) == 0 && got > uint64(len(s.tokens)+len(s.appending)):
		return fmt.Errorf("%s: %d positions, but only %d were appended", s.name, got, len(s.tokens)+len(s.appending))
	case len(states) == 0:
		w.lost += s.safe - min(got, s.safe)
		return fmt.Errorf("%s: %d positions were safe, %d are there", s.name, s.safe, got)
	}
	s.appending, s.cutting, s.cuts, s.sealed = nil, false, nil, a.Sealed
	for _, c := range states[1:] {
		if got == 0 {
			break
		}
		err := w.readAll(ctx, s, states[0].tokens[:got])
		if s.damaged = errors.Is(err, errDamaged); s.damaged || err == nil {
			break
		}
		states[0] = c
	}
	// What it is said to hold is checked with all the rest.
	s.tokens, s.safe = states[0].tokens[:got:got], min(s.safe, got)
	return nil
}

// readAll says whether a sequence holds tokens.
func (w *worker) readAll(ctx context.Context, s *sequence, tokens []uint64) error {
	as, before := *s, w.tally
	defer func() { w.tally = before }()
	as.tokens = tokens
	for l := range int(w.specs[s.kind].Layers) {
		if err := w.readBack(ctx, &as, l); err != nil {
			return err
		}
	}
	return nil
}

// checkAll reads everything back and asks.
func (w *worker) checkAll(ctx context.Context, n int) error {
	for i, s := range w.seqs {
		b := &kvtierv1.Budget{Mode: kvtierv1.AttendMode_ATTEND_MODE_EXACT}
		if (i+n)%3 == 0 {
			b = &kvtierv1.Budget{Mode: kvtierv1.AttendMode_ATTEND_MODE_BUDGET, Share: .3}
		}
		err := w.checkOne(ctx, s, b)
		if errors.Is(err, errDamaged) {
			w.damaged++
		} else if err != nil {
			return err
		}
	}
	return nil
}

func (w *worker) checkOne(ctx context.Context, s *sequence, b *kvtierv1.Budget) error {
	if len(s.tokens) == 0 {
		return nil
	}
	if s.damaged {
		return errDamaged
	}
	for l := range int(w.specs[s.kind].Layers) {
		if err := w.readBack(ctx, s, l); err != nil {
			return err
		}
		if err := w.ask(ctx, s, l, b); err != nil {
			return err
		}
	}
	return w.match(ctx, s)
}

// worstRow is how far a row may be from what was appended.
func worstRow(p kvtierv1.Profile) float64 {
	switch p {
	case kvtierv1.Profile_PROFILE_EXACT:
		return 0
	case kvtierv1.Profile_PROFILE_NEUTRAL:
		return .03
	}
	// Of 25 million rows one was .26 off: 256 tokens share a channel's bins, so
	// that a short key errs by more of its length. Another token's row of the
	// same topic is more than .4 off.
	return .33
}

// readBack compares a layer's rows with what was appended.
func (w *worker) readBack(ctx context.Context, s *sequence, layer int) error {
	sp := w.specs[s.kind]
	from := 0
	if len(sp.LayerKinds) > 0 {
		if win := int(sp.LayerKinds[layer].SlidingWindow); win > 0 {
			from = max(0, len(s.tokens)-win)
		}
	}
	r, err := w.p.seq.ReadKV(ctx, &kvtierv1.ReadKVRequest{SequenceId: s.id, Layer: uint32(layer), Start: uint64(from), Count: uint64(len(s.tokens) - from)})
	if err := w.outcome("read back", err); err != nil {
		return err
	}
	exact := len(s.tokens)
	if from == 0 {
		d, err := w.p.look.DescribeSequence(ctx, &kvtierv1.DescribeSequenceRequest{SequenceId: s.id})
		if err := w.outcome("describe", err); err != nil {
			return err
		}
		exact = int(d.Info.Ack.Sealed)
	}
	heads, d := int(sp.KvHeads), int(sp.HeadDim)
	for what, b := range map[int][]byte{keys: r.K, values: r.V} {
		want, got := rows(s.tokens[from:], from, layer, heads, d, what), fromBF16(b)
		if len(got) != len(want) {
			return fmt.Errorf("%s: read %d of %d elements", s.name, len(got), len(want))
		}
		for t := range len(s.tokens) - from {
			w.rows++
			lo, hi := t*heads*d, (t+1)*heads*d
			allowed := 0.0
			if from == 0 && t < exact {
				allowed = worstRow(s.profile)
			}
			if e := apart(got[lo:hi], want[lo:hi], d); !(e <= allowed) {
				w.wrongRows++
				return fmt.Errorf("WRONG ROW: %s, %v, layer %d, position %d of %d (%d sealed), tensor %d: off by %.3g",
					s.name, s.profile, layer, from+t, len(s.tokens), exact, what, e)
			}
		}
	}
	return nil
}

// match finds the sequence by its tokens: names are made anew at every start.
func (w *worker) match(ctx context.Context, s *sequence) error {
	sp := w.specs[s.kind]
	if len(sp.LayerKinds) > 0 {
		return nil // not every point of a sliding window can be continued from
	}
	r, err := w.p.seq.MatchPrefix(ctx, &kvtierv1.MatchPrefixRequest{Spec: sp, Profile: s.profile, TokenIds: s.tokens, AllowSparse: true})
	if err := w.outcome("match", err); err != nil {
		return err
	}
	if want := uint64(len(s.tokens)) / 64 * 64; r.Matched < want && !w.lies.logs[s.id] {
		return fmt.Errorf("%s: a prefix of %d tokens matches, want %d", s.name, r.Matched, want)
	}
	return nil
}

// verify reads every stored byte.
func verify(ctx context.Context, p clients) error {
	st, err := p.look.Verify(ctx, &kvtierv1.VerifyRequest{})
	if err != nil {
		return err
	}
	for {
		r, err := st.Recv()
		if status.Code(err) != codes.OK {
			return fmt.Errorf("verify: %w", err)
		}
		if len(r.Damage) > 0 {
			return fmt.Errorf("verify: %v", r.Damage)
		}
		if r.Finished {
			return nil
		}
	}
}

// The check itself must notice: a row of another token, and a token less.
func TestNotices(t *testing.T) {
	sp := specs()[0]
	tokens := []uint64{1, 2, 3, 4, 5, 6, 7, 8}
	a := rows(tokens, 0, 0, 2, 32, keys)
	b := rows([]uint64{1, 2, 3, 9, 5, 6, 7, 8}, 0, 0, 2, 32, keys)
	if e := apart(b, a, 32); e < 1.5*worstRow(kvtierv1.Profile_PROFILE_BALANCED) {
		t.Errorf("another token's row is only %v off", e)
	}
	x, y := dense(sp, 0, tokens), dense(sp, 0, append(tokens[1:7:7], 8))
	if e := apart(x, y, 32); e < 10*tolerance(kvtierv1.Profile_PROFILE_EXACT, &kvtierv1.Budget{Mode: kvtierv1.AttendMode_ATTEND_MODE_EXACT}, nil) {
		t.Errorf("a context without its first token answers only %v off", e)
	}
}
