// Package ram holds copies of pieces in slabs of memory outside the Go heap.
//
// Who decides what. The arena is the truth about room: pieces are cut from
// slabs, mapped as needed up to the byte limit, and no piece is admitted before
// its room is reserved. The tier's own map, keyed by (id, head, plane), is the
// truth about what is held. Ristretto (TinyLFU admission, sampled LFU
// eviction, cost = bytes) is asked only when the free room does not suffice:
// it then says whether the newcomer deserves room and whose room it takes.
// What ristretto calls evicted is a proposal: it is carried out when the whole
// Put fits, and taken back otherwise, so a Put that fails changes nothing.
//
// Fragmentation. Freed neighbours coalesce. If the policy's victims leave holes
// that are too small, it is asked for more, and at last the run of neighbouring
// pieces that frees the room at the least cost in bytes goes. So the room is
// found unless pinned or held pieces are in the way.
//
// Life of a piece: reserved (room, no bytes, invisible), resident (one
// reference, plus one for each pin), forgotten (evicted or dropped: its pins
// still read it), freed with the last reference.
//
// A GPU that copies from slabs by itself has them pinned: Slab says where bytes lie, and Options.Unmapping is asked before that goes.
//
// What the policy learns. Each release credits its piece with 1/8 plus 7/8 of
// the square root of the attention received; a whole credit touches ristretto
// once. The root is there because shares are small in a long context (1/500
// with 500 segments): a piece with four times the average share still counts
// about twice, while one that is scanned but never attended counts an eighth. All of
// it is multiplied by the root of the share of the piece that was read: of values a query reads a few rows here
// and there, of means all, and it is bytes that contend for room. A miss
// touches with probability 1/8, the weight of a release without attention, so
// that missing does not look hotter than being held. Ristretto ages its counters.
package ram
