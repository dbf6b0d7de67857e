package flip

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/server"
)

var (
	flips = flag.Int("flips", 100, "how many bytes are flipped, one at a time")
	seed  = flag.Uint64("seed", 1, "what the flips follow from")
)

// outcome of a flip, from best to worst.
type outcome int

const (
	harmless outcome = iota
	shorter          // a tail has fewer tokens
	atQuery          // something was answered with an error
	atOpen           // the folder was refused
	outcomes
)

func (o outcome) String() string {
	return [...]string{"harmless", "a shorter tail", "an error when asked", "refused at opening"}[o]
}

// truth answers from an undamaged copy, and remembers.
type truth struct {
	d    *daemon
	list []*kvtierv1.SequenceInfo
	mu   sync.Mutex
	seen map[question]proto.Message
	runs map[string][]run // what is in use of extents
}

// question identifies what is asked of one sequence.
type question struct {
	id     string
	layer  int
	end    uint64 // tokens that are looked at
	sparse bool
	read   bool // the rows, not an answer
}

// folder is in memory, if there is a file system in it: every flip opens a
// database and syncs it.
func folder(t *testing.T) string {
	dir, err := os.MkdirTemp("/dev/shm", "kvflip")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func TestFlip(t *testing.T) {
	if testing.Short() {
		*flips = min(*flips, 40)
	}
	dir := folder(t)
	closed, killed := build(t, filepath.Join(dir, "made"))
	begin := time.Now()
	var mu sync.Mutex
	count := map[string]*[outcomes]int{}
	wrong := 0
	var g errgroup.Group
	for half, m := range []*image{&closed, &killed} {
		tr := newTruth(t, m, filepath.Join(dir, fmt.Sprintf("truth%d", half)))
		g.Go(func() error {
			own := filepath.Join(dir, fmt.Sprintf("own%d", half))
			for n := range *flips / 2 {
				rng := rand.New(rand.NewPCG(*seed, uint64(n)<<1|uint64(half)))
				d := m.pick(rng, n)
				o, err := try(m, tr, own, d)
				mu.Lock()
				kind := kindOf(d.file)
				if count[kind] == nil {
					count[kind] = &[outcomes]int{}
				}
				count[kind][o]++
				if err != nil {
					wrong++
					t.Errorf("seed %d, half %d, flip %d, %s byte %d ^ %#x: %v", *seed, half, n, d.file, d.at, d.mask, err)
				}
				mu.Unlock()
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	report(count, wrong, time.Since(begin))
}

// Every byte of a log that says what follows, or takes tokens back: rows that
// were taken back must not return because the record that did so is damaged. A run of few flips takes each fourth of the bytes.
func TestFlipRecords(t *testing.T) {
	every := 1
	if *flips < 1000 {
		every = 4
	}
	dir := folder(t)
	_, m := build(t, filepath.Join(dir, "made"))
	tr := newTruth(t, &m, filepath.Join(dir, "truth"))
	for _, s := range tr.list {
		if s.Name != "tail" {
			continue
		}
		for _, name := range m.names {
			if !strings.Contains(name, s.SequenceId) {
				continue
			}
			for i, at := range headBytes(m.files[name]) {
				if (i+int(*seed%4))%every != 0 {
					continue
				}
				d := damage{name, at, 1 << (i % 8)}
				if _, err := try(&m, tr, filepath.Join(dir, "own"), d); err != nil {
					t.Errorf("%s byte %d ^ %#x: %v", d.file, d.at, d.mask, err)
				}
			}
		}
	}
}

// headBytes returns where the headers of a log's records lie, and whole short records.
func headBytes(log []byte) (at []int) {
	const head = 36 // docs/format.md, 10
	for off := 0; off+head <= len(log); {
		n := int(binary.LittleEndian.Uint64(log[off+8:]))
		for i := range head + n {
			if i < head || n == 8 {
				at = append(at, off+i)
			}
		}
		off += head + n
	}
	return at
}

// kindOf sorts files for the report.
func kindOf(file string) string {
	switch dir := filepath.Dir(file); {
	case dir == "tails":
		return "tail logs"
	case dir == "segments":
		return "extents"
	case strings.HasPrefix(dir, "catalogue"):
		name, _, _ := strings.Cut(filepath.Base(file), "-")
		if ext := filepath.Ext(name); ext != "" {
			name = "*" + ext
		}
		return "catalogue/" + name
	}
	return filepath.Base(file)
}

func report(count map[string]*[outcomes]int, wrong int, took time.Duration) {
	var kinds []string
	var sum [outcomes]int
	for k := range count {
		kinds = append(kinds, k)
	}
	slices.Sort(kinds)
	for _, k := range kinds {
		fmt.Printf("flip: %-20s", k)
		for o, n := range count[k] {
			sum[o] += n
			fmt.Printf(" %5d %v", n, outcome(o))
		}
		fmt.Println()
	}
	fmt.Printf("flip: %d flips:", *flips/2*2)
	for o, n := range sum {
		fmt.Printf(" %d %v,", n, outcome(o))
	}
	fmt.Printf(" %d wrong; seed %d, %v\n", wrong, *seed, took.Round(time.Second))
}

// try flips one byte and asks everything. An error is a wrong answer.
func try(m *image, tr *truth, dir string, d damage) (o outcome, err error) {
	if err := errors.Join(m.restore(dir), d.apply(dir)); err != nil {
		return 0, err
	}
	checked, err := server.Check(context.Background(), server.CheckOptions{DataDir: dir})
	if err != nil {
		return 0, fmt.Errorf("check: %w", err)
	}
	defer func() { err = errors.Join(err, tr.compareCheck(d, checked, o)) }()
	srv, err := open(dir)
	if err != nil {
		if !strings.Contains(err.Error(), "restore") {
			return atOpen, fmt.Errorf("refused, but not clearly: %w", err)
		}
		return atOpen, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	o, err = tr.compare(ctx, srv)
	if err != nil {
		err = fmt.Errorf("%w; log:\n%s", err, srv.log)
	}
	return o, errors.Join(err, srv.close())
}

func newTruth(t *testing.T, m *image, dir string) *truth {
	t.Helper()
	if err := m.restore(dir); err != nil {
		t.Fatal(err)
	}
	runs := checkWhole(t, dir)
	d, err := open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.close() })
	list, err := d.look.ListSequences(t.Context(), &kvtierv1.ListSequencesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	tr := &truth{d: d, list: list.Sequences, seen: map[question]proto.Message{}, runs: runs}
	if o, err := tr.compare(t.Context(), d); err != nil || o != harmless {
		t.Fatalf("the undamaged folder: %v, %v", o, err)
	}
	return tr
}

// compare asks all that can be asked.
func (tr *truth) compare(ctx context.Context, d *daemon) (o outcome, err error) {
	list, err := d.look.ListSequences(ctx, &kvtierv1.ListSequencesRequest{})
	if err != nil {
		return atQuery, nil
	}
	if len(list.Sequences) > len(tr.list) {
		return o, fmt.Errorf("%d sequences, there were %d", len(list.Sequences), len(tr.list))
	}
	for _, want := range tr.list {
		got, err := tr.compareSequence(ctx, d, want)
		if err != nil {
			return got, fmt.Errorf("%s: %w", want.Name, err)
		}
		o = max(o, got)
	}
	return o, nil
}

func (tr *truth) compareSequence(ctx context.Context, d *daemon, want *kvtierv1.SequenceInfo) (o outcome, err error) {
	s, err := d.seq.OpenSequence(ctx, &kvtierv1.OpenSequenceRequest{SequenceId: want.SequenceId})
	if err != nil {
		if status.Code(err) == codes.NotFound {
			return o, errors.New("gone without a word")
		}
		return atQuery, nil
	}
	n := s.Ack.Accepted
	if n > want.Ack.Accepted {
		return o, fmt.Errorf("%d tokens, there were %d", n, want.Ack.Accepted)
	}
	if n < want.Ack.Accepted {
		o = shorter
	}
	if err := tr.describe(ctx, d, want.SequenceId, n); err != nil {
		return o, err
	}
	for l := range int(s.Spec.Layers) {
		for _, q := range []question{{layer: l, end: n}, {layer: l, end: n, sparse: true}, {layer: l, end: 90, sparse: true}, {layer: l, end: n, read: true}} {
			if q.id = want.SequenceId; q.end == 0 || q.end > n {
				continue
			}
			got, err := tr.askSame(ctx, d, q, s.Spec)
			if err != nil {
				return o, err
			}
			o = max(o, got)
		}
	}
	return o, nil
}

// describe compares what is said of the first n tokens.
func (tr *truth) describe(ctx context.Context, d *daemon, id string, n uint64) error {
	r := &kvtierv1.DescribeSequenceRequest{SequenceId: id, TokenIds: true}
	got, err := d.look.DescribeSequence(ctx, r)
	if err != nil {
		return nil
	}
	want, err := tr.d.look.DescribeSequence(ctx, r)
	if err != nil {
		return err
	}
	if len(got.TokenIds) != int(n) || !slices.Equal(got.TokenIds, want.TokenIds[:n]) {
		return fmt.Errorf("other token ids: %d", len(got.TokenIds))
	}
	if got.Info.Name != want.Info.Name || got.Info.ParentId != want.Info.ParentId || got.Info.Profile != want.Info.Profile || !proto.Equal(got.Spec, want.Spec) {
		return fmt.Errorf("another description: %v, want %v", got.Info, want.Info)
	}
	for i, s := range got.Sealed {
		// References may be fewer or more: it is not this sequence that is damaged.
		if w := want.Sealed[i]; s.Start != w.Start || s.Limit != w.Limit || s.Tokens != w.Tokens || !bytes.Equal(s.SpanId, w.SpanId) {
			return fmt.Errorf("another span: %v, want %v", s, w)
		}
	}
	for i, l := range got.Spans {
		if i >= len(want.Spans) || !proto.Equal(l, want.Spans[i]) {
			return fmt.Errorf("another label: %v", l)
		}
	}
	return nil
}

// askSame asks the damaged folder; what it answers must be the truth.
func (tr *truth) askSame(ctx context.Context, d *daemon, q question, sp *kvtierv1.ModelSpec) (outcome, error) {
	got, err := ask(ctx, d, q, sp)
	want, expected := tr.answer(ctx, q, sp)
	if err != nil {
		switch code := status.Code(err); {
		case expected != nil && code == status.Code(expected):
			return harmless, nil
		case code == codes.Internal, code == codes.Unknown, code == codes.DeadlineExceeded, code == codes.InvalidArgument:
			return atQuery, fmt.Errorf("an unclear error: %w", err)
		}
		return atQuery, nil
	}
	if expected != nil {
		return harmless, fmt.Errorf("%+v: an answer where there was none: %w", q, expected)
	}
	if !proto.Equal(got, want) {
		return harmless, fmt.Errorf("%+v: ANOTHER ANSWER", q)
	}
	return harmless, nil
}

func (tr *truth) answer(ctx context.Context, q question, sp *kvtierv1.ModelSpec) (proto.Message, error) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	if m := tr.seen[q]; m != nil {
		return m, nil
	}
	m, err := ask(ctx, tr.d, q, sp)
	if err == nil {
		tr.seen[q] = m
	}
	return m, err
}

// ask asks one thing; of an answer only output and log-sum-exp are kept.
func ask(ctx context.Context, d *daemon, q question, sp *kvtierv1.ModelSpec) (proto.Message, error) {
	if q.read {
		start := uint64(0)
		if len(sp.LayerKinds) > 0 && sp.LayerKinds[q.layer].SlidingWindow > 0 {
			start = q.end - min(q.end, uint64(sp.LayerKinds[q.layer].SlidingWindow))
		}
		return d.seq.ReadKV(ctx, &kvtierv1.ReadKVRequest{SequenceId: q.id, Layer: uint32(q.layer), Start: start, Count: q.end - start})
	}
	b := &kvtierv1.Budget{Mode: kvtierv1.AttendMode_ATTEND_MODE_EXACT}
	if q.sparse {
		b = &kvtierv1.Budget{Mode: kvtierv1.AttendMode_ATTEND_MODE_BUDGET, Share: .3}
	}
	r, err := d.seq.Attend(ctx, &kvtierv1.AttendRequest{Layer: uint32(q.layer), Dtype: kvtierv1.ElementType_ELEMENT_TYPE_BF16, Budget: b,
		Items: []*kvtierv1.AttendItem{{SequenceId: q.id, Start: q.end - 1, Q: tensor(32, uint64(q.layer), q.end, 5)}}})
	if err != nil {
		return nil, err
	}
	return &kvtierv1.AttendResult{Output: r.Results[0].Output, Lse: r.Results[0].Lse}, nil
}
