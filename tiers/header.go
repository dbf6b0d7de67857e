package tiers

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash/crc32"
	"math"

	"kvtier/attention/kernels"
)

// Sizes that the format fixes; docs/format.md specifies it to the byte.
const (
	// BlockSize is the unit of checksums and of disk I/O, in bytes.
	BlockSize = 4096
	// PageTokens and LeafTokens are the tokens of a page and of a leaf.
	PageTokens = 64
	LeafTokens = 16
	// StepTokens is how many stored tokens share one set of key steps.
	StepTokens = 256
	// SegmentTokens is the length of a full segment; segments end at its multiples.
	SegmentTokens = 2048
	// SinkTokens is how many tokens at the start of a sequence stay exact.
	SinkTokens = 16
	// pieceAlign is the alignment of pieces inside a part: a cache line.
	pieceAlign = 64

	formatVersion = 4
	headerMagic   = "KVTIERSG"
)

// ID addresses a segment: SHA-256 of what it holds. Every checksum of the
// segment is seeded with it, so bytes of different segments never pass for each other.
type ID [sha256.Size]byte

func (id ID) String() string { return hex.EncodeToString(id[:8]) }

// Profile says how a segment is stored.
type Profile uint8

// The profiles; the numbers are those of the protocol and of the format.
const (
	ProfileExact    Profile = 1
	ProfileNeutral  Profile = 2
	ProfileBalanced Profile = 3
)

// Plane is one bit-slice or kind of side information of a head of a segment.
type Plane uint8

// The planes, in the order in which an image holds them: what is read first lies first.
const (
	PlanePages  Plane = iota // mean keys and mean values of pages
	PlaneMap                 // how values deviate from their page's mean if keys do
	PlaneOrder               // position of each stored token
	PlaneSteps               // order of the bits of keys; lower ends and widths of their bins
	PlaneK1                  // the bits of keys that scores depend on most, half a bit a channel
	PlaneK2                  // the next bits: with them 1 bit a channel
	PlaneK3                  // the next bits: with them 2 bits a channel
	PlaneK4                  // the next bits: with them 5 bits a channel
	PlaneV4                  // value scales and the high 4 bits of the value codes
	PlaneDrains              // the last bits of the drains' key and value codes
	PlaneSinks               // the sequence's first tokens, unquantised
	PlaneWindow              // a sliding-window layer's last rows, unquantised
	PlaneKX                  // lossless keys
	PlaneVX                  // lossless values
	PlaneK8                  // the last bits of the key codes
	PlaneV8                  // low 4 bits of the value codes
	NumPlanes
)

// KeyPlanes are the planes of the key codes, in the order in which they are read.
var KeyPlanes = [5]Plane{PlaneK1, PlaneK2, PlaneK3, PlaneK4, PlaneK8}

var planeNames = [NumPlanes]string{"pages", "map", "order", "steps", "k1", "k2",
	"k3", "k4", "v4", "drains", "sinks", "window", "kx", "vx", "k8", "v8"}

func (p Plane) String() string {
	if p < NumPlanes {
		return planeNames[p]
	}
	return fmt.Sprintf("plane(%d)", uint8(p))
}

// PlaneSet is a set of planes.
type PlaneSet uint16

// AllPlanes and LowPlanes are the sets that Drop is used with.
const (
	AllPlanes PlaneSet = 1<<NumPlanes - 1
	LowPlanes PlaneSet = 1<<PlaneK8 | 1<<PlaneV8
)

// Has says whether the set holds p.
func (s PlaneSet) Has(p Plane) bool { return s>>p&1 == 1 }

// Part is a run of an image's blocks that live and die together.
type Part uint8

// The parts of an image.
const (
	PartMain Part = iota
	PartLow       // the low planes, which a balanced sequence drops when it outgrows reading everything
	NumParts
)

// Part says in which part a plane lies.
func (p Plane) Part() Part {
	if LowPlanes.Has(p) {
		return PartLow
	}
	return PartMain
}

// HeadInfo counts the tokens of one KV head of a segment by how they are stored.
// Body + Outliers + Sinks is the segment's number of tokens (a window segment has none of them).
type HeadInfo struct {
	Body, Outliers, Sinks int
	// KeyExp scales keys: stored steps are in units of 2^KeyExp.
	KeyExp int
	// QueryNorm2 is the mean squared norm of the sampled queries, scaled; 0 if there were none.
	QueryNorm2 float32
	// CodecError is the relative error of attention over the 4-bit codes of this head alone,
	// measured at sealing; NaN never.
	CodecError float32
}

// extent of a piece inside its part, in bytes.
type extent struct{ off, len uint32 }

// Header describes one sealed segment: all that is needed to find, check and
// read its pieces. Headers are immutable.
type Header struct {
	ID       ID
	Profile  Profile
	Type     uint8 // compress.ElementType of unquantised planes
	HeadDim  int
	Layer    int
	Start    uint64 // position of the first token
	Tokens   int
	Heads    []HeadInfo
	pieces   [][NumPlanes]extent
	crcs     [NumParts][]uint32
	idSeed   uint32
	partSize [NumParts]int
}

// Piece returns where a piece lies inside its part, in bytes. ok is false if
// the segment has no such piece.
func (h *Header) Piece(head int, p Plane) (off, n int, ok bool) {
	if head < 0 || head >= len(h.pieces) || p >= NumPlanes {
		return 0, 0, false
	}
	e := h.pieces[head][p]
	return int(e.off), int(e.len), e.len > 0
}

// Blocks returns the number of blocks of a part.
func (h *Header) Blocks(p Part) int { return len(h.crcs[p]) }

// Bytes returns the size of a part as stored, whole blocks.
func (h *Header) Bytes(p Part) int64 { return int64(len(h.crcs[p])) * BlockSize }

// CheckBlocks verifies consecutive blocks of a part, b[0] being block first.
// len(b) is a multiple of BlockSize. The error is ErrCorrupt.
func (h *Header) CheckBlocks(p Part, first int, b []byte) error {
	for i := 0; len(b) > 0; i++ {
		if first < 0 || first+i >= len(h.crcs[p]) || len(b) < BlockSize {
			return fmt.Errorf("segment %v: block %d is outside part %d: %w", h.ID, first+i, p, ErrCorrupt)
		}
		if next := b[BlockSize:]; len(next) > 0 { // what a device wrote is in no cache of this core
			kernels.Prefetch(next[:min(BlockSize, len(next))])
		}
		if crc32.Update(h.idSeed, castagnoli, b[:BlockSize]) != h.crcs[p][first+i] {
			return fmt.Errorf("segment %v: checksum of block %d of part %d: %w", h.ID, first+i, p, ErrCorrupt)
		}
		b = b[BlockSize:]
	}
	return nil
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// crcSeed makes a checksum's start value from an id.
func crcSeed(id ID) uint32 { return crc32.Checksum(id[:], castagnoli) }

// NewHeader lays out the pieces of a segment and names it. pieces holds the
// bytes of every piece by head; an empty piece is absent. The returned parts
// are the image, padded to whole blocks.
func NewHeader(h Header, pieces [][NumPlanes][]byte) (*Header, [NumParts][]byte) {
	h.pieces = make([][NumPlanes]extent, len(pieces))
	var parts [NumParts][]byte
	for p := Plane(0); p < NumPlanes; p++ {
		part := p.Part()
		for head := range pieces {
			b := pieces[head][p]
			if len(b) == 0 {
				continue
			}
			parts[part] = pad(parts[part], pieceAlign)
			h.pieces[head][p] = extent{uint32(len(parts[part])), uint32(len(b))}
			parts[part] = append(parts[part], b...)
		}
	}
	sum := sha256.New()
	sum.Write(h.core())
	for i := range parts {
		h.partSize[i] = len(parts[i])
		parts[i] = pad(parts[i], BlockSize)
		sum.Write(parts[i])
	}
	sum.Sum(h.ID[:0])
	h.idSeed = crcSeed(h.ID)
	for i, b := range parts {
		h.crcs[i] = make([]uint32, len(b)/BlockSize)
		for j := range h.crcs[i] {
			h.crcs[i][j] = crc32.Update(h.idSeed, castagnoli, b[j*BlockSize:(j+1)*BlockSize])
		}
	}
	return &h, parts
}

func pad(b []byte, align int) []byte {
	if r := len(b) % align; r != 0 {
		b = append(b, make([]byte, align-r)...)
	}
	return b
}

// core is the part of a header that the id covers.
func (h *Header) core() []byte {
	b := make([]byte, 0, 64+len(h.Heads)*(16+8*int(NumPlanes)))
	le := binary.LittleEndian
	b = append(b, headerMagic...)
	b = le.AppendUint32(b, formatVersion)
	b = append(b, byte(h.Profile), h.Type)
	b = le.AppendUint16(b, uint16(h.HeadDim))
	b = le.AppendUint32(b, uint32(h.Layer))
	b = le.AppendUint64(b, h.Start)
	b = le.AppendUint32(b, uint32(h.Tokens))
	b = le.AppendUint16(b, uint16(len(h.Heads)))
	b = le.AppendUint16(b, uint16(NumPlanes))
	for _, i := range h.Heads {
		b = le.AppendUint16(b, uint16(i.Body))
		b = le.AppendUint16(b, uint16(i.Outliers))
		b = le.AppendUint16(b, uint16(i.Sinks))
		b = le.AppendUint16(b, uint16(int16(i.KeyExp)))
		b = le.AppendUint32(b, math.Float32bits(i.QueryNorm2))
		b = le.AppendUint32(b, math.Float32bits(i.CodecError))
	}
	for _, row := range h.pieces {
		for _, e := range row {
			b = le.AppendUint32(b, e.off)
			b = le.AppendUint32(b, e.len)
		}
	}
	return b
}

// Marshal returns the header's bytes: the core, the id, the block checksums,
// and a checksum over all of it.
func (h *Header) Marshal() []byte {
	le := binary.LittleEndian
	b := h.core()
	b = append(b, h.ID[:]...)
	for _, c := range h.crcs {
		b = le.AppendUint32(b, uint32(len(c)))
		for _, v := range c {
			b = le.AppendUint32(b, v)
		}
	}
	return appendSum(b)
}

// appendSum appends the checksum that ends a header.
func appendSum(b []byte) []byte {
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// limits on what a header may claim, so that sizes are checked before use.
const (
	maxHeads    = 256
	maxHeadDim  = 256
	maxPartSize = 1 << 30
)

// UnmarshalHeader reads what Marshal wrote. The error is ErrCorrupt or ErrVersion.
func UnmarshalHeader(b []byte) (*Header, error) {
	bad := func(what string) (*Header, error) {
		return nil, fmt.Errorf("segment header: %s: %w", what, ErrCorrupt)
	}
	const fixed = 8 + 4 + 2 + 2 + 4 + 8 + 4 + 2 + 2
	if len(b) < fixed+sha256.Size+12 {
		return bad("too short")
	}
	le := binary.LittleEndian
	if crc32.Checksum(b[:len(b)-4], castagnoli) != le.Uint32(b[len(b)-4:]) {
		return bad("checksum")
	}
	if string(b[:8]) != headerMagic {
		return bad("magic")
	}
	if v := le.Uint32(b[8:]); v != formatVersion {
		return nil, fmt.Errorf("segment header: version %d, this build reads %d: %w", v, formatVersion, ErrVersion)
	}
	h := &Header{Profile: Profile(b[12]), Type: b[13], HeadDim: int(le.Uint16(b[14:])),
		Layer: int(le.Uint32(b[16:])), Start: le.Uint64(b[20:]), Tokens: int(le.Uint32(b[28:]))}
	heads, planes := int(le.Uint16(b[32:])), int(le.Uint16(b[34:]))
	if h.Profile < ProfileExact || h.Profile > ProfileBalanced {
		return bad("profile")
	}
	if heads == 0 || heads > maxHeads || planes != int(NumPlanes) || h.HeadDim > maxHeadDim ||
		h.HeadDim == 0 || h.Tokens > SegmentTokens {
		return bad("counts")
	}
	rest := b[fixed : len(b)-4]
	if len(rest) < heads*(16+8*planes)+sha256.Size {
		return bad("too short for its heads")
	}
	for range heads {
		h.Heads = append(h.Heads, HeadInfo{Body: int(le.Uint16(rest)), Outliers: int(le.Uint16(rest[2:])),
			Sinks: int(le.Uint16(rest[4:])), KeyExp: int(int16(le.Uint16(rest[6:]))),
			QueryNorm2: math.Float32frombits(le.Uint32(rest[8:])), CodecError: math.Float32frombits(le.Uint32(rest[12:]))})
		rest = rest[16:]
	}
	h.pieces = make([][NumPlanes]extent, heads)
	for i := range h.pieces {
		for p := range h.pieces[i] {
			e := extent{le.Uint32(rest), le.Uint32(rest[4:])}
			h.pieces[i][p] = e
			rest = rest[8:]
			if end := int(e.off) + int(e.len); end > maxPartSize {
				return bad("piece too large")
			} else if part := Plane(p).Part(); end > h.partSize[part] {
				h.partSize[part] = end
			}
		}
	}
	copy(h.ID[:], rest)
	rest = rest[sha256.Size:]
	for i := range h.crcs {
		if len(rest) < 4 {
			return bad("too short for its checksums")
		}
		n := int(le.Uint32(rest))
		rest = rest[4:]
		if n > len(rest)/4 || n*BlockSize < h.partSize[i] {
			return bad("block count")
		}
		h.crcs[i] = make([]uint32, n)
		for j := range h.crcs[i] {
			h.crcs[i][j] = le.Uint32(rest[4*j:])
		}
		rest = rest[4*n:]
	}
	if len(rest) != 0 {
		return bad("trailing bytes")
	}
	h.idSeed = crcSeed(h.ID)
	return h, nil
}

// Pieces lists the pieces that lie in parts, with their bytes.
func (h *Header) Pieces(parts [NumParts][]byte) []Piece {
	var out []Piece
	for head := range h.pieces {
		for p := Plane(0); p < NumPlanes; p++ {
			off, n, ok := h.Piece(head, p)
			if ok && len(parts[p.Part()]) >= off+n {
				out = append(out, Piece{head, p, parts[p.Part()][off : off+n]})
			}
		}
	}
	return out
}
