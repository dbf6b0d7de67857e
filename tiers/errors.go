package tiers

import "errors"

// Errors of this package and of every tier, wrapped with operation and key.
var (
	// ErrNotFound: no such segment, piece or name.
	ErrNotFound = errors.New("not found")
	// ErrCorrupt: stored bytes failed their checksum or cannot be what they claim to be.
	ErrCorrupt = errors.New("corrupt")
	// ErrFull: the byte limit leaves no room, or the disk is full.
	ErrFull = errors.New("full")
	// ErrVersion: the bytes were written by a version that this one cannot read.
	ErrVersion = errors.New("unknown version")
	// ErrLost: the device that the tier lies on is gone; what it held lies in the tiers below.
	ErrLost = errors.New("lost")
	// ErrClosed: the tier or store was closed.
	ErrClosed = errors.New("closed")
)
