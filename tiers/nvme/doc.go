// Package nvme keeps parts of segments as runs of blocks in flat extent files.
//
// A part is written once, in one write, and read by blocks. Every block is
// verified before it is written and after it is read, against the checksums of
// the header, which are seeded with the segment's id: what fails is never
// stored and never returned.
//
// The tier has no index of its own on disk. Where a segment lies is its
// Location, which the caller commits to a catalogue, in this order:
//
//	Put, Sync, Locate -> commit the Location    the segment is durable
//	commit its removal -> Drop                  the blocks may be reused
//
// At start the caller Restores what the catalogue has; all else is free room.
// Were Drop to come before the committed removal, a crash could leave a
// Location whose blocks belong to another segment: its checksums then fail.
// Dropping some planes of a part only hides them: the run is freed with the
// part's last plane, and a Location does not remember what was hidden.
//
// Extents are preallocated, so that a run that was handed out does not meet a
// full disk, and read with direct I/O where the file system has it: RAM is for
// the RAM tier, not for a second copy in the page cache.
package nvme
