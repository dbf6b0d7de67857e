// Package crash ends the daemon in every way and looks at what comes back.
//
// Workers change sequences over gRPC (bulk and single-step appends, forks,
// truncations, short seals, deletions, queries), the daemon ends, another one
// starts on what is left, and is held to what was acknowledged:
//
//   - every position acknowledged as safe is there, in every layer, and its rows
//     are the ones that were appended: bit for bit in the open tail and in
//     profile exact, within the codec's error otherwise;
//   - answers agree with dense attention in float64 over the appended rows;
//   - what was deleted stays deleted, forks have their origin's tokens, nothing
//     appears that nobody made, and no stored byte fails its checksum.
//
// Then the workers go on with the same sequences.
//
// TestCrash kills the real kvtierd with SIGKILL at a random moment, be it in
// the middle of a call, of sealing or of recovery. Safe is what was acknowledged
// as crash_safe. A few daemons work at once, each on a folder of its own. What a
// worker does follows from -seed, the number of the kill and what survived the
// kills before; the moment of a kill follows from the seed, but what the daemon
// was doing then is up to the machine.
//
// TestPowerCut runs the daemon's server on a disk in memory (tiers/files/filestest),
// under the catalogue, the extents, the logs and the small files alike. Power is
// cut between any two changes of the disk, those of recovery included: what was
// not synced is lost, kept, torn or reordered. Safe is what was acknowledged as
// power_safe. Some rounds begin with a kill instead, so that a cut finds what the
// page cache had kept from before it.
//
// TestFaultyDisk lets that disk fail (EIO, ENOSPC, reads and writes that end half
// way, syncs that fail and forget), dawdle and lie (reads of other bytes, writes
// that are dropped or go astray) while the worker works and while the next
// daemon starts, which may refuse to. Every answer has to be right or an error.
// Then the daemon stops, is killed or loses power, the faults end, and everything
// must be there but what the disk said it had written and had not.
//
//	make crash                    1,000 kills
//	make power                    1,000 cuts and 300 disks with faults
//	make power CUTS=100000 SEED=7
//	go test ./bench/crash -run Crash -args -kills=50 -seed=7 -keep
//	go test ./bench/crash -run PowerCut -args -cuts=1000 -seed=7 -cut=345 -keep
//	go test ./bench/crash -run FaultyDisk -args -faulty=300 -seed=7 -fault=12
//	go test ./bench/crash -run 'PowerCut|FaultyDisk' -args -recover=8
//
// A cut or a disk that fails its check is done again by its seed and number, with
// the same -cuts; -keep leaves what a cut left as a data folder. All but Pebble's
// work in the background follows from the seed: a start reads one log after the other here, where
// a daemon reads several at the same time (-recover=8, and TestCrash).
//
// # That they bite
//
// Each of these changes was made for a trial, and TestPowerCut failed within 600
// cuts: no sync of a log, of a new log, of its folder, of extents, of a new
// extent's folder, of a new folder, of the catalogue, of small files or of a log
// that was replayed; the old log removed before the commit; power_safe said with
// the write, or left as it was by a truncation. TestFaultyDisk failed within 300
// disks with logs read once, Pebble's log read anew for writing, or blocks not
// checked. It did not notice, in as many, that a short write of an extent or a
// second sync after one that failed was believed: the tests of tiers/nvme and
// tiers/taillog do.
//
// # What this cannot show
//
// Names in Pebble's folder survive a cut in the order of their changes, as ext4
// and XFS have it, because Pebble counts on that; in the daemon's own folders they
// do not. A failed write of Pebble's ends the daemon, so its files have only reads
// go wrong. The file CHANGES is not synced: after a power cut nobody notices if
// the disk also reads the end of Pebble's log wrongly. A disk that says it flushed
// and did not is beyond all of this.
package crash
