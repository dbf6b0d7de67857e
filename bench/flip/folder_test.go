package flip

import (
	"bytes"
	"context"
	"encoding/binary"
	"io/fs"
	"log/slog"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/server"
)

// daemon is a server in this process, behind gRPC.
type daemon struct {
	srv  *server.Server
	g    *grpc.Server
	conn *grpc.ClientConn
	seq  kvtierv1.SequenceServiceClient
	look kvtierv1.InspectionServiceClient
	log  *bytes.Buffer
}

func open(dir string) (*daemon, error) {
	d := &daemon{log: &bytes.Buffer{}}
	var err error
	d.srv, err = server.Open(context.Background(), server.Options{DataDir: dir, RAMBytes: 256 << 10, DiskBytes: 1 << 20,
		ReadAllTokens: -1, AuditShare: -1, Logger: slog.New(slog.NewTextHandler(d.log, nil))})
	if err != nil {
		return nil, err
	}
	d.g = grpc.NewServer(server.GRPCOptions()...)
	d.srv.Register(d.g)
	l := bufconn.Listen(1 << 20)
	go func() { _ = d.g.Serve(l) }() // ends with Stop
	d.conn, err = grpc.NewClient("passthrough:kvtier", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		return nil, err
	}
	d.seq, d.look = kvtierv1.NewSequenceServiceClient(d.conn), kvtierv1.NewInspectionServiceClient(d.conn)
	return d, nil
}

func (d *daemon) close() error {
	_ = d.conn.Close()
	d.g.Stop()
	return d.srv.Close(context.Background())
}

func full() *kvtierv1.ModelSpec {
	return &kvtierv1.ModelSpec{Layers: 2, QueryHeads: 2, KvHeads: 1, HeadDim: 16, Fingerprint: []byte("flip, full"),
		KvDtype: kvtierv1.ElementType_ELEMENT_TYPE_BF16}
}

func sliding() *kvtierv1.ModelSpec {
	s := full()
	s.Fingerprint = []byte("flip, sliding")
	s.LayerKinds = []*kvtierv1.LayerKind{{SlidingWindow: 60}, {}}
	s.SinkLogits = []float32{.5, -1, 0, 1}
	return s
}

// tensor returns n rows of elements, bf16, that follow from the key.
func tensor(n int, key ...uint64) []byte {
	var seed uint64
	for _, k := range key {
		seed = seed*1_000_003 + k + 1
	}
	rng := rand.New(rand.NewPCG(seed, 9))
	b := make([]byte, 0, 2*n)
	for range n {
		b = binary.LittleEndian.AppendUint16(b, uint16(math.Float32bits(float32(rng.NormFloat64()))>>16))
	}
	return b
}

// builder fills a folder.
type builder struct {
	t testing.TB
	d *daemon
}

func (b *builder) open(r *kvtierv1.OpenSequenceRequest) string {
	b.t.Helper()
	s, err := b.d.seq.OpenSequence(context.Background(), r)
	if err != nil {
		b.t.Fatal(err)
	}
	return s.SequenceId
}

// feed appends tokens [lo, hi), in steps.
func (b *builder) feed(id string, sp *kvtierv1.ModelSpec, salt uint64, lo, hi, step int) {
	b.t.Helper()
	for ; lo < hi; lo += step {
		n := min(step, hi-lo)
		for l := range int(sp.Layers) {
			r := &kvtierv1.AppendRequest{SequenceId: id, Layer: uint32(l), Start: uint64(lo), Dtype: kvtierv1.ElementType_ELEMENT_TYPE_BF16,
				K: tensor(n*16, salt, uint64(l), uint64(lo), 0), V: tensor(n*16, salt, uint64(l), uint64(lo), 1), Queries: tensor(32, uint64(l), uint64(lo), 2)}
			if l == 0 {
				for i := range n {
					r.TokenIds = append(r.TokenIds, salt<<20|uint64(lo+i))
					r.TokenText = append(r.TokenText, []byte("word "))
				}
				r.Spans = []*kvtierv1.Span{{Start: uint64(lo), End: uint64(lo + n), Label: "a chunk"}}
			}
			if _, err := b.d.seq.Append(context.Background(), r); err != nil {
				b.t.Fatal(err)
			}
		}
	}
}

func (b *builder) flush(id string) {
	b.t.Helper()
	if _, err := b.d.seq.Flush(context.Background(), &kvtierv1.FlushRequest{SequenceId: id, Seal: true}); err != nil {
		b.t.Fatal(err)
	}
}

func (b *builder) truncate(id string, n uint64) {
	b.t.Helper()
	if _, err := b.d.seq.Truncate(context.Background(), &kvtierv1.TruncateRequest{SequenceId: id, Length: n}); err != nil {
		b.t.Fatal(err)
	}
}

// build makes the folder in two sessions, so that the catalogue has tables and
// a write-ahead log, and returns copies of it: closed, and as a kill leaves it.
func build(t testing.TB, dir string) (closed, killed image) {
	session := func(fn func(*builder)) {
		d, err := open(dir)
		if err != nil {
			t.Fatal(err)
		}
		fn(&builder{t, d})
		killed = load(t, dir)
		if err := d.close(); err != nil {
			t.Fatal(err)
		}
	}
	ids := map[string]string{}
	session(func(b *builder) {
		for i, p := range []kvtierv1.Profile{kvtierv1.Profile_PROFILE_BALANCED, kvtierv1.Profile_PROFILE_NEUTRAL, kvtierv1.Profile_PROFILE_EXACT} {
			id := b.open(&kvtierv1.OpenSequenceRequest{Spec: full(), Profile: p, Name: p.String()})
			ids[p.String()] = id
			b.feed(id, full(), uint64(i+1), 0, 420, 420)
			b.flush(id)
			b.feed(id, full(), uint64(i+1), 420, 440, 5)
		}
		gone := b.open(&kvtierv1.OpenSequenceRequest{Spec: full(), Name: "gone"})
		b.feed(gone, full(), 20, 0, 400, 400)
		b.flush(gone)
		if _, err := b.d.seq.DeleteSequence(context.Background(), &kvtierv1.DeleteSequenceRequest{SequenceId: gone}); err != nil {
			t.Fatal(err)
		}
	})
	session(func(b *builder) {
		id := b.open(&kvtierv1.OpenSequenceRequest{Spec: sliding(), Profile: kvtierv1.Profile_PROFILE_BALANCED, Name: "sliding"})
		b.feed(id, sliding(), 10, 0, 400, 400)
		b.flush(id)
		b.feed(id, sliding(), 10, 400, 410, 5)
		fork := b.open(&kvtierv1.OpenSequenceRequest{ForkOf: ids["PROFILE_EXACT"], ForkAt: 100, Name: "fork inside a span"})
		b.feed(fork, full(), 11, 100, 110, 10)
		tail := b.open(&kvtierv1.OpenSequenceRequest{Spec: full(), Profile: kvtierv1.Profile_PROFILE_EXACT, Name: "tail"})
		b.feed(tail, full(), 12, 0, 30, 10)
		b.truncate(tail, 25)
		b.feed(tail, full(), 13, 25, 45, 10)
		b.truncate(tail, 40) // the last record of the log
		cut := b.open(&kvtierv1.OpenSequenceRequest{ForkOf: ids["PROFILE_NEUTRAL"], Name: "cut"})
		b.truncate(cut, 150) // in the sealed part
		b.feed(cut, full(), 14, 150, 153, 1)
	})
	return load(t, dir), killed
}

// image is a folder's content.
type image struct {
	files map[string][]byte
	names []string // of files that are not empty, sorted
	full  map[string][]int
}

const block = 4096

func load(t testing.TB, dir string) image {
	t.Helper()
	m := image{files: map[string][]byte{}, full: map[string][]int{}}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		name, _ := filepath.Rel(dir, path)
		m.files[name] = b
		if len(b) > 0 {
			m.names = append(m.names, name)
		}
		for at := 0; at < len(b); at += block {
			if bytes.IndexFunc(b[at:min(at+block, len(b))], func(r rune) bool { return r != 0 }) >= 0 {
				m.full[name] = append(m.full[name], at)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(m.names)
	return m
}

// restore makes dir hold the image. Extents, which are large, are only written
// where they differ.
func (m *image) restore(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		if name, _ := filepath.Rel(dir, path); m.files[name] == nil {
			return os.Remove(path)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for name, b := range m.files {
		path := filepath.Join(dir, name)
		if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, b) {
			continue
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// damage is one byte to change.
type damage struct {
	file string
	at   int
	mask byte
}

// pick chooses a byte. The first flips go over all files in turn.
func (m *image) pick(rng *rand.Rand, n int) damage {
	const turns = 4
	name := m.names[n%len(m.names)]
	if n >= turns*len(m.names) && rng.IntN(3) > 0 {
		name = m.weighted(rng)
	}
	d := damage{file: name, mask: byte(1 + rng.IntN(255)), at: rng.IntN(len(m.files[name]))}
	if fullBlocks := m.full[name]; rng.IntN(10) > 0 && len(fullBlocks) > 0 {
		at := fullBlocks[rng.IntN(len(fullBlocks))]
		d.at = at + rng.IntN(min(block, len(m.files[name])-at))
	}
	return d
}

// weighted chooses a file by the blocks that hold something.
func (m *image) weighted(rng *rand.Rand) string {
	total := 0
	for _, b := range m.full {
		total += len(b)
	}
	x := rng.IntN(total)
	for _, name := range m.names {
		if x -= len(m.full[name]); x < 0 {
			return name
		}
	}
	return m.names[0]
}

func (d damage) apply(dir string) error {
	f, err := os.OpenFile(filepath.Join(dir, d.file), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], int64(d.at)); err != nil {
		return err
	}
	b[0] ^= d.mask
	_, err = f.WriteAt(b[:], int64(d.at))
	return err
}

// timeout of everything asked of one folder.
const timeout = time.Minute
