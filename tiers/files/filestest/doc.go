// Package filestest has a disk in memory, for tests: it keeps a trace of every
// change, can lose power between any two of them, and fails or lies on demand.
//
// After a power cut (Disk.PowerCut) a file holds what was written before its
// last Sync. Of what was written since, any part may be there: a write is lost,
// kept, or torn into sectors of 512 bytes or blocks of 4 KiB of which each is
// lost or kept, and a later one may be there without an earlier one. The same
// goes for a change of length, and for names that were made, renamed or removed
// since the last SyncDir of their directory; only a rename is one step. Names in
// Pebble's directory survive in the order in which they were made, as they do in
// ext4 and XFS: Pebble makes a manifest and then a marker that names it, and
// syncs their directory once.
//
// After a kill (Disk.Kill) everything is there, as the page cache outlives a
// process, but what was not durable is not durable yet.
//
// A Sticky file system is another one whose reads are slow, or get stuck.
package filestest
