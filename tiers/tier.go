package tiers

import "context"

// Tier is a place where pieces of sealed segments lie. All methods are safe
// for concurrent use. tiertest holds the suite that every tier passes.
type Tier interface {
	// Put stores pieces of one segment, all or none; they are copied. A piece
	// that is already held is left as it is: segments are immutable. ErrFull
	// says that there is no room, or that other pieces earn the room more; it
	// changes nothing.
	Put(ctx context.Context, h *Header, pieces []Piece) error

	// Pin returns the wanted ranges of the pieces that the tier holds, one Pin
	// a request, in order. A piece that it does not hold gives a Pin that is
	// not Held: a miss is no error. Bytes that fail their checksum are
	// ErrCorrupt, and then nothing stays pinned.
	Pin(ctx context.Context, reqs []Request) ([]Pin, error)

	// Drop forgets the planes of a segment. Pinned bytes stay valid until they
	// are released; their room is free after that.
	Drop(id ID, planes PlaneSet) error

	// Usage says what the tier holds now and did so far.
	Usage() Usage

	// Close releases the tier's memory and files. Pins must have been released.
	Close() error
}

// Holder is what a tier that evicts by itself can do besides: keep a segment.
// What is held of it, and what will be put, stays until Hold is called with
// false, or Drop. It counts towards the byte limit.
type Holder interface {
	Hold(id ID, held bool) error
}

// Piece is one plane of one head of a segment, whole.
type Piece struct {
	Head  int
	Plane Plane
	Bytes []byte
}

// Range is a run of bytes inside a piece.
type Range struct{ Off, Len int }

// LineSize is a cache line, in bytes: the unit in which reading from RAM is counted.
const LineSize = 64

// LineBytes is how many bytes of cache lines ranges touch. A line that ends one
// range and begins the next counts once.
func LineBytes(ranges []Range) int {
	lines, last := 0, -1
	for _, r := range ranges {
		if r.Len == 0 {
			continue
		}
		first, to := r.Off/LineSize, (r.Off+r.Len-1)/LineSize
		if first == last {
			first++
		}
		lines += to - first + 1
		last = to
	}
	return lines * LineSize
}

// Request asks for ranges of a piece. No ranges means the whole piece.
type Request struct {
	Header *Header
	Head   int
	Plane  Plane
	Ranges []Range
}

// Pin holds bytes of a piece in memory until it is released.
type Pin struct {
	// Ranges holds the bytes asked for, in order. Readers must not change them.
	Ranges [][]byte
	// Transferred counts the bytes that left the tier for this pin: 64-byte
	// lines from RAM, whole blocks from disk.
	Transferred int
	// Cached counts the bytes, in lines, that a tier on disk gave out of memory instead.
	Cached int
	// Late counts the bytes asked for that did not come before the reader's Patience was out. Their ranges are nil.
	Late    int
	release func(attention float32)
}

// NewPin is for tiers: release is called once, when the pin is released.
func NewPin(ranges [][]byte, transferred int, release func(attention float32)) Pin {
	return Pin{Ranges: ranges, Transferred: transferred, release: release}
}

// Held says whether the tier had the piece.
func (p *Pin) Held() bool { return p.release != nil }

// Release gives the bytes back and says what share of the query's attention
// they received, 0 to 1. Releasing twice, or a pin that is not held, does nothing.
func (p *Pin) Release(attention float32) {
	if r := p.release; r != nil {
		p.release, p.Ranges = nil, nil
		r(attention)
	}
}

// Usage is what a tier holds now and did so far.
type Usage struct {
	BytesUsed, BytesLimit int64
	Pieces                int64
	Hits, Misses          int64
	BytesRead             int64
	BytesWritten          int64
	Evictions             int64
	Corruptions           int64
	LateReads             int64 // that a reader's Patience did not last for
}

// Moved counts the bytes that pins transferred, by tier.
type Moved struct{ GPU, RAM, NVMe int64 }

// Add sums up.
func (m *Moved) Add(o Moved) { m.GPU += o.GPU; m.RAM += o.RAM; m.NVMe += o.NVMe }
