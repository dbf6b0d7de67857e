// Package store is the home of sealed segments: the NVMe tier that keeps them,
// the RAM tier in front of it, and the catalogue that says what is there.
//
// A segment is written to the NVMe tier, made durable, and then committed to
// the catalogue together with the records that refer to it; what the catalogue
// does not name is free space. So a crash at any moment leaves a segment
// whole or absent. Readers pin pieces; what RAM does not hold is read from
// NVMe, checked, and brought up in the background if it is wanted often.
//
// The catalogue is a Pebble database: one record a segment, and the records
// that the server keeps of spans and sequences, one byte of kind before the key.
//
// Where no daemon runs, an Inspection reads the same folder, says what is wrong
// in it, and changes nothing.
package store
