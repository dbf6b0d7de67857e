// Package crash kills the daemon and looks at what comes back.
//
// Its test runs the real kvtierd on a temporary folder, lets a few workers
// change sequences over gRPC (bulk and single-step appends, forks,
// truncations, short seals, deletions, queries), kills the process with
// SIGKILL at a random moment, be it in the middle of a call, of sealing or of
// recovery, starts it again, and holds it to what it acknowledged:
//
//   - every position acknowledged as crash-safe is there, in every layer, and
//     its rows are the ones that were appended: bit for bit in the open tail and
//     in profile exact, within the codec's error otherwise;
//   - answers agree with dense attention in float64 over the appended rows;
//   - what was deleted stays deleted, forks have their origin's tokens, nothing
//     appears that nobody made, and no stored byte fails its checksum.
//
// Then the workers go on with the same sequences.
//
// What a worker does follows from -seed, the number of the kill and what
// survived the kills before; the moment of a kill follows from the seed, but
// what the daemon was doing then is up to the machine.
//
//	make crash                    200 kills
//	make crash KILLS=1000
//	go test ./bench/crash -args -kills=50 -seed=7 -keep
//
// # What this cannot show
//
// SIGKILL ends the process, not the machine: what write(2) took stays in the
// page cache, so a missing fsync goes unnoticed here. That is exactly the
// difference between crash_safe and power_safe: crash_safe says that write(2)
// returned; power_safe is only raised after fdatasync of the log did (see
// Log.Sync in tiers/taillog), and a new log, its folder, extents and catalogue
// are synced before the old log goes. The order of these steps is what the
// tests of tiers/nvme and tiers/store check; a disk that lies about a flush is
// beyond all of them.
package crash
