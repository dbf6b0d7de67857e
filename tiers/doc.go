// Package tiers holds sealed segments and says where their bytes lie.
//
// Three facts carry it:
//
//  1. A sealed segment is immutable and named by what it holds. It is encoded
//     once, so every tier holds the same bytes: no invalidation, writing back
//     is idempotent, recovery is a scan.
//  2. Softmax partials merge. A query can be answered piece by piece where the
//     pieces lie, in any order.
//  3. Attention over sealed tokens does not depend on their order, so tokens
//     are stored next to the tokens that are attended with them.
//
// The words:
//
//	span      consecutive tokens of a sequence; sealed, one segment for each layer
//	segment   a sealed span of one layer, all its KV heads; its ID is a hash of its bytes
//	page      64 tokens of one KV head that are near each other as keys
//	leaf      16 tokens of a page: the unit in which keys are read
//	means     what is known of a page without reading it
//	plane     one bit-slice, or one kind of side information, of a head of a segment
//	piece     one plane of one head of one segment: the unit of residency
//	block     4,096 bytes of a segment's image: the unit of checksums and of disk I/O
//	part      blocks of an image that live and die together: Main, or Low (the last bits)
//
// A segment is durable once it lies in the NVMe tier and the catalogue says so.
// RAM holds copies of pieces. There is no unpinned read: a reader pins what it
// reads, and releasing the pin says how much attention the piece received,
// which is what promotion and eviction learn from.
package tiers
