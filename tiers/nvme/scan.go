package nvme

import (
	"cmp"
	"context"
	"errors"
	"io"
	"runtime"
	"slices"

	"golang.org/x/sync/errgroup"

	"kvtier/tiers"
)

// Stored is a part of a segment as it lies on disk. Nothing of it was checked.
type Stored struct {
	ID   tiers.ID
	Part tiers.Part
	Run  Run
	// Bytes are those of the run, or of as much of it as could be read: valid
	// until the function that gets them returns.
	Bytes []byte
	// Err is why Bytes end before the run does; io.ErrUnexpectedEOF if the file does.
	Err error
}

// scanBytes is how much Scan reads at once, unless a part is longer.
const scanBytes = 4 << 20

// Scan reads every part that the tier holds, in the order in which they lie on
// disk, and calls fn for each, for several at once: while parts are checked on
// all cores, the next are read. Its memory is scanBytes, or the longest part if
// that is more, for each core and one besides. An error of fn ends it.
func (t *Tier) Scan(ctx context.Context, fn func(Stored) error) error {
	if err := t.begin(); err != nil {
		return err
	}
	defer t.ops.Done()
	g, failed := errgroup.WithContext(ctx)
	g.SetLimit(min(runtime.GOMAXPROCS(0), runtime.NumCPU())) // the caller's goroutine holds one more buffer
	for _, stretch := range stretches(t.Layout()) {
		if failed.Err() != nil {
			break
		}
		buf, err := stretch.read(t)
		g.Go(func() error {
			defer buf.free()
			return stretch.each(buf.bytes, err, fn)
		})
	}
	return cmp.Or(g.Wait(), ctx.Err())
}

// Reread reads a part once more.
func (t *Tier) Reread(s Stored, fn func(Stored) error) error {
	if err := t.begin(); err != nil {
		return err
	}
	defer t.ops.Done()
	b := stretch{{ID: s.ID, Part: s.Part, Run: s.Run}}
	buf, err := b.read(t)
	defer buf.free()
	return b.each(buf.bytes, err, fn)
}

// Layout lists all parts by place, without bytes.
func (t *Tier) Layout() (all []Stored) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for id, s := range t.mu.segments {
		for p, st := range s.parts {
			if st != nil {
				all = append(all, Stored{ID: id, Part: tiers.Part(p), Run: st.run})
			}
		}
	}
	slices.SortFunc(all, func(a, b Stored) int {
		return cmp.Or(cmp.Compare(a.Run.Extent, b.Run.Extent), cmp.Compare(a.Run.First, b.Run.First))
	})
	return all
}

// stretch is parts of one extent that are read at once, with what lies between them.
type stretch []Stored

// stretches cuts a layout up.
func stretches(all []Stored) (out []stretch) {
	for len(all) > 0 {
		n := 1
		for n < len(all) && all[n].Run.Extent == all[0].Run.Extent && stretch(all[:n+1]).bytes() <= scanBytes {
			n++
		}
		out, all = append(out, all[:n:n]), all[n:]
	}
	return out
}

func (b stretch) bytes() int64 {
	last := b[len(b)-1].Run
	return (int64(last.First) + int64(last.Blocks) - int64(b[0].Run.First)) * tiers.BlockSize
}

// read returns as much of the stretch as could be read, and why it is not all.
func (b stretch) read(t *Tier) (buf *buffer, err error) {
	t.mu.Lock()
	f := t.mu.extents[b[0].Run.Extent].file
	t.mu.Unlock()
	buf = newBuffer(int(b.bytes()))
	off, done := int64(b[0].Run.First)*tiers.BlockSize, 0
	for done < len(buf.bytes) && err == nil {
		var n int
		n, err = f.ReadAt(buf.bytes[done:min(len(buf.bytes), done+scanBytes)], off+int64(done))
		done += n
		if n > 0 && done == len(buf.bytes) {
			err = nil
		}
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
	}
	buf.bytes = buf.bytes[:done]
	t.read.Add(int64(done))
	return buf, err
}

// each hands out the parts.
func (b stretch) each(bytes []byte, err error, fn func(Stored) error) error {
	for _, s := range b {
		lo := int(s.Run.First-b[0].Run.First) * tiers.BlockSize
		hi := lo + int(s.Run.Blocks)*tiers.BlockSize
		if s.Bytes = bytes[min(lo, len(bytes)):min(hi, len(bytes))]; hi > len(bytes) {
			s.Err = err
		}
		if err := fn(s); err != nil {
			return err
		}
	}
	return nil
}
