package disk

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"kvtier/tiers"
)

// writers are the numbers of segments that are written at once.
var writers = []int{1, 4}

// measureWrites writes segments, and syncs after every syncEvery of them; fio
// writes and syncs as much in blocks of the same size.
func measureWrites(ctx context.Context, o Options, f fio, dir string) (rows []Row, err error) {
	// The segments of a repeat are the same in all of them: each has a tier of its own.
	rng := rand.NewChaCha8(seedOf(o.Seed, 2))
	segments := make([]segment, o.Written/segmentBytes/syncEvery*syncEvery)
	for i := range segments {
		segments[i].h, segments[i].pieces = newSegment(rng, uint64(i))
	}
	for _, depth := range writers {
		o.Say("writing %d MiB, %d segments at once", len(segments)*segmentBytes>>20, depth)
		var ways []way
		if f.there() {
			ways = append(ways, way{"fio libaio", func(ctx context.Context) (float64, float64, error) {
				return f.write(ctx, dir, len(segments), depth)
			}})
		}
		ways = append(ways, way{"tier", func(ctx context.Context) (float64, float64, error) {
			return put(ctx, filepath.Join(dir, "put"), segments, depth)
		}})
		got, err := inTurns(ctx, o.Repeats, Row{What: "write", Block: segmentBytes, Depth: depth}, ways)
		if err != nil {
			return nil, err
		}
		rows = append(rows, got...)
	}
	return rows, nil
}

type segment struct {
	h      *tiers.Header
	pieces []tiers.Piece
}

// write is a fio job: one after the other into a preallocated file.
func (f fio) write(ctx context.Context, dir string, n, depth int) (rate, cpu float64, err error) {
	const name = "fio"
	defer func() { err = errors.Join(err, os.Remove(filepath.Join(dir, name))) }()
	return f.run(ctx, dir, "--rw=write", "--filename="+name, "--fallocate=posix", fmt.Sprint("--size=", n*segmentBytes), "--refill_buffers",
		"--ioengine=libaio", fmt.Sprint("--bs=", segmentBytes), fmt.Sprint("--iodepth=", depth), fmt.Sprint("--fdatasync=", syncEvery), "--end_fsync=1")
}

// put writes segments to a new tier, so many at once. The making of the files is not counted.
func put(ctx context.Context, dir string, segments []segment, depth int) (rate, cpu float64, err error) {
	t, err := openTier(dir, int64(len(segments)*segmentBytes))
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, t.Close(), os.RemoveAll(dir)) }()
	c := start()
	var next atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	for range depth {
		g.Go(func() error {
			for {
				i := next.Add(1) - 1
				if i >= int64(len(segments)) {
					return nil
				}
				if err := t.Put(ctx, segments[i].h, segments[i].pieces); err != nil {
					return err
				}
				if (i+1)%syncEvery == 0 {
					if err := t.Sync(ctx); err != nil {
						return err
					}
				}
			}
		})
	}
	if err := g.Wait(); err != nil {
		return 0, 0, err
	}
	if err := t.Sync(context.WithoutCancel(ctx)); err != nil {
		return 0, 0, err
	}
	rate, cpu = c.per(int64(len(segments)))
	return rate, cpu, nil
}
