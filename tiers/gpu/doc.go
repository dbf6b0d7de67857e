// Package gpu holds copies of pieces in the memory of a GPU, where kernels attend them.
//
// Without GPU support in the build (see package cuda) Open says so, and the
// rest is never reached.
//
// Room. The tier allocates slabs of device memory up to its byte limit and cuts
// pieces from them, in multiples of 256 bytes. What is put in one call lies in
// one run of addresses where there is a hole for that, so that it is one copy;
// else every piece lies where there is room. Slabs stay until Close. If the
// device has less memory than the limit says, what it has becomes the limit.
//
// Who stays. A segment goes as a whole, because a kernel needs the planes of
// all its heads; the coldest goes first. Heat is use, fading by half every
// minute; see heat. Every Put is admitted that the room of colder and warmer
// segments suffices for: a newcomer is colder than what is in use, so it is
// newcomers that make room for newcomers.
//
// Up. The device copies what lies in slabs of the RAM tier, which are pinned for that (pinned.go); the rest Put copies through pinned buffers. Both
// are in a stream of their own: the device computes meanwhile. A piece is visible when all of it has arrived, so kernels
// wait for nothing.
//
// Kernels read what a lease names. What is dropped under a lease
// keeps its room until the lease ends, what is leased is not evicted, and a lease ends after the kernel: its
// holder has seen an event to that effect, or leaves it to the tier (abandon).
//
// Down. Pin copies ranges into host memory, for readers of bytes. The copies
// belong to the pin and keep nothing in the tier. The bytes are trusted, as those in RAM are: they
// were checked when they left the disk.
//
// Failure. If the device is lost, every call is tiers.ErrLost: what it held
// lies below. A copy that fails otherwise fails its call alone. A device that does not answer is left
// alone until it does: see patience.go.
package gpu
