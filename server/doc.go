// Package server holds sequences: it takes in their keys and values, seals
// them, answers queries from them, and finds them again after a restart.
//
// A sequence is sealed spans, one segment for each layer, and an open tail:
// the newest tokens, unquantised, in RAM and in a log. Appends of a sequence
// are serialised by its write lock, which may be held across I/O; its state is
// guarded by a second lock, which may not. A query takes a snapshot of the
// state and works without locks: sealed spans are immutable, and tail rows are
// only ever appended behind what a snapshot sees.
//
// Two front ends share all of it: gRPC (grpc.go) and the Unix-socket fast path
// (fast.go).
package server
