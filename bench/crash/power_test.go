package crash

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"hash/fnv"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/cryptotest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	kvtierv1 "kvtier/proto/kvtier/v1"
	"kvtier/server"
	"kvtier/tiers"
	"kvtier/tiers/files/filestest"
)

var (
	cuts   = flag.Int("cuts", 60, "how often power is cut")
	atOnce = flag.Int("recover", 1, "how many logs a start reads at the same time; with more than 1 not all follows from -seed")
	cutNow = flag.Int("cut", -1, "cut power this time only, of all those that -cuts and -seed make")
)

const (
	stepsPerRound = 24 // of the workload
	cutsPerRound  = 20
	stepsAfterCut = 3
	newDiskEvery  = 5 // rounds
)

var inMemorySize = size{sequences: 4, tokens: 700, bulk: 150, segment: 2048}

// inMemory is a daemon in this process, on a disk that can lose power.
type inMemory struct {
	clients
	srv  *server.Server
	grpc *grpc.Server
	conn *grpc.ClientConn
	done chan error
	log  *bytes.Buffer
}

// openOn recovers a disk. before is called before each call of a client, with
// what the disk had done when the last one returned.
func openOn(ctx context.Context, disk *filestest.Disk, before func(ops int)) (*inMemory, error) {
	d := &inMemory{log: &bytes.Buffer{}, done: make(chan error, 1)}
	var err error
	d.srv, err = server.Open(ctx, server.Options{DataDir: "/data", FS: disk, RAMBytes: 128 << 10, DiskBytes: 8 << 20, TailBytes: 64 << 20,
		RecoverAtOnce: *atOnce, ReadAllTokens: 1, AuditShare: -1, SyncInterval: time.Hour, // logs are synced by flushes alone, so that the trace follows from the seed
		Logger: slog.New(slog.NewTextHandler(&syncedWriter{w: d.log}, nil))})
	if err != nil {
		return nil, fmt.Errorf("recovery: %w\n%s", err, d.log)
	}
	d.grpc = grpc.NewServer(server.GRPCOptions()...)
	d.srv.Register(d.grpc)
	l := bufconn.Listen(1 << 20)
	go func() { d.done <- d.grpc.Serve(l) }()
	ops := disk.Ops()
	d.conn, err = grpc.NewClient("passthrough:memory", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)),
		grpc.WithUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			before(ops)
			defer func() { ops = disk.Ops() }()
			return invoke(ctx, method, req, reply, cc, opts...)
		}))
	if err != nil {
		return nil, errors.Join(err, d.close(ctx))
	}
	d.clients = newClients(d.conn)
	return d, nil
}

// settled waits until nothing is being sealed: what is sealed when is then up
// to the seed.
func (d *inMemory) settled(ctx context.Context) error {
	for {
		st, err := d.look.GetStatus(ctx, &kvtierv1.GetStatusRequest{})
		if err != nil || st.SealsPending == 0 {
			return err
		}
		time.Sleep(100 * time.Microsecond)
	}
}

func (d *inMemory) close(ctx context.Context) error {
	if d.conn != nil {
		_ = d.conn.Close()
	}
	d.grpc.Stop()
	err := errors.Join(d.srv.Close(ctx), <-d.done)
	return err
}

// complaint is an error if the daemon logged one.
func (d *inMemory) complaint() error {
	if bytes.Contains(d.log.Bytes(), []byte("level=ERROR")) {
		return errors.New("the daemon complained")
	}
	return nil
}

type syncedWriter struct {
	mu sync.Mutex
	w  *bytes.Buffer
}

func (s *syncedWriter) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.w.Write(b)
}

// known is what the worker knew when the disk had done so much.
type known struct {
	ops  int
	seqs []*sequence
	made int
	gone map[string]bool
}

func (w *worker) known(ops int) known {
	k := known{ops: ops, made: w.made, gone: maps.Clone(w.deleted)}
	for _, s := range w.seqs {
		c := *s
		c.tokens, c.cuts = slices.Clip(c.tokens), slices.Clone(c.cuts) // who goes on from here must not write into the other's
		k.seqs = append(k.seqs, &c)
	}
	return k
}

func (k known) worker(of *worker, rng *rand.Rand) *worker {
	w := &worker{number: of.number, size: of.size, power: true, specs: of.specs, rng: rng, made: k.made, deleted: maps.Clone(k.gone)}
	for _, s := range k.seqs {
		c := *s
		c.cuts = slices.Clone(c.cuts)
		w.seqs = append(w.seqs, &c)
	}
	return w
}

// life opens a disk, holds it to what is known, works and closes it. It
// returns what was known when.
func life(t *testing.T, disk *filestest.Disk, w *worker, steps, n int) (history []known, err error) {
	cryptotest.SetGlobalRandom(t, w.rng.Uint64()) // ids of sequences are random
	ctx := t.Context()
	history = append(history, w.known(0))
	d, err := openOn(ctx, disk, func(ops int) { history = append(history, w.known(ops)) })
	if err != nil {
		return nil, err
	}
	defer func() {
		history = append(history, w.known(disk.Ops()))
		e := d.close(ctx)
		if !w.lying {
			e = errors.Join(e, d.complaint())
		}
		if err != nil || e != nil {
			err = fmt.Errorf("%w\n%s%v", errors.Join(err, e), d.log, disk)
		}
	}()
	if err := check(ctx, d.clients, []*worker{w}, n, true); err != nil {
		return nil, err
	}
	for range steps {
		w.ops++
		if err := w.step(ctx); err != nil && !errors.Is(err, errDamaged) {
			return nil, err
		}
		if err := d.settled(ctx); err != nil {
			return nil, err
		}
	}
	return history, nil
}

// cutAt is a moment in the life of a disk.
type cutAt struct {
	disk       *filestest.Disk
	number, at int
	known      known // before it
}

// cut returns what is left, and where to go on from it.
func (c cutAt) cut() (*filestest.Disk, *rand.Rand) {
	rng := rand.New(rand.NewPCG(*seed, uint64(c.number)+1<<48))
	return c.disk.PowerCut(c.at, rng), rng
}

// TestPowerCut lets a worker change sequences on a disk in memory, cuts power
// between two writes, recovers what the disk then holds, checks it and goes on.
// One run of the daemon serves many cuts: the disk's trace says what it would
// have held at any moment, and history what was acknowledged by then.
func TestPowerCut(t *testing.T) {
	if testing.Short() {
		*cuts = min(*cuts, 20)
	}
	base := &worker{size: inMemorySize, specs: specs()}
	var disk *filestest.Disk
	var from known
	var sum tally
	begin, done, killed, rounds, ops := time.Now(), 0, 0, 0, 0
	trace := fnv.New64a()
	for round := 0; done < *cuts && !t.Failed(); round++ {
		rng := rand.New(rand.NewPCG(*seed, uint64(round)<<32))
		if round%newDiskEvery == 0 {
			disk, from = filestest.NewDisk(), known{gone: map[string]bool{}}
		}
		w := from.worker(base, rng)
		start := disk.Ops() // not none after a kill
		history, err := life(t, disk, w, stepsPerRound, round)
		if err != nil {
			t.Fatalf("round %d of seed %d: %v", round, *seed, err)
		}
		sum.add(w.tally)
		ops += disk.Ops() - start
		rounds++
		fmt.Fprintln(trace, disk.Ops())
		// The next round goes on from the last cut. Of a new disk that is one in the
		// first half, where the folder is being made.
		var last cutAt
		for range min(cutsPerRound, *cuts-done) {
			c := cutAt{known: history[0], disk: disk, number: done, at: start + rng.IntN(disk.Ops()-start+1)}
			if done++; round%newDiskEvery == 0 && c.number%cutsPerRound == cutsPerRound-1 {
				c.at /= 2
			}
			for _, k := range history {
				if k.ops <= c.at {
					c.known = k
				}
			}
			last = c
			if *cutNow >= 0 && c.number != *cutNow {
				continue
			}
			after, rng := c.cut()
			w := c.known.worker(base, rng)
			if err := checkOffline(after); err != nil {
				t.Errorf("cut %d of seed %d, at change %d of %d of round %d: %v", c.number, *seed, c.at, disk.Ops(), round, err)
			}
			if _, err := life(t, after, w, stepsAfterCut, c.number); err != nil {
				t.Errorf("cut %d of seed %d, at change %d of %d of round %d (from %d on): %v", c.number, *seed, c.at, disk.Ops(), round, start, err)
				t.Logf("before it:\n%s", disk.Trace(max(0, c.at-25), c.at))
				if *keep {
					after, _ := c.cut()
					t.Log("kept in", unload(t, after))
				}
				break
			}
			sum.add(w.tally)
		}
		// Or from a kill at the same moment: then what was not durable is not yet durable.
		if from = last.known; rng.IntN(4) > 0 {
			disk, _ = last.cut()
		} else {
			disk = disk.Kill(last.at)
			killed++
		}
	}
	fmt.Printf("power: %d cuts between any two of %d changes to the disk (%d rounds of %d after a kill), %d positions acknowledged as power-safe, %d lost, "+
		"%d answers checked, %d wrong, %d rows read back, %d wrong; %d operations, %d flushes, %d forks; seed %d, trace %x, %v\n",
		done, ops, killed, rounds, sum.acked, sum.lost, sum.answers, sum.wrong, sum.rows, sum.wrongRows, sum.ops, sum.seals, sum.forks, *seed, trace.Sum64(), time.Since(begin).Round(time.Second))
}

// checkOffline looks at a disk as a power cut left it: it may give notes, but
// nothing on it is damaged.
func checkOffline(disk *filestest.Disk) error {
	r, err := server.Check(context.Background(), server.CheckOptions{DataDir: "/data", FS: disk})
	switch {
	case errors.Is(err, tiers.ErrNotFound): // it was being made
		return nil
	case err != nil:
		return fmt.Errorf("check: %w", err)
	case r.Damage+r.Unread > 0:
		return fmt.Errorf("check: %+v", r.Findings)
	}
	return nil
}

// unload writes a disk to a folder that kvtierd can open.
func unload(t *testing.T, disk *filestest.Disk) string {
	dir, err := os.MkdirTemp("", "kvpower")
	if err == nil {
		err = disk.Walk(func(name string, data []byte) error {
			path := filepath.Join(dir, name)
			return errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, data, 0o600))
		})
	}
	if err != nil {
		t.Error(err)
	}
	return dir
}
