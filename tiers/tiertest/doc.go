// Package tiertest is the suite that every tier passes, and segments to test with.
//
// The suite puts whole parts of segments, because that is what every tier
// takes; what only one tier promises is tested beside it. A tier may forget
// pieces by itself only if it counts Evictions.
package tiertest
