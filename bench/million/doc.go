// Package million holds a context far larger than memory in a real daemon, and answers decode steps from it.
//
// The context is made up by bench/synth, whose heads are calibrated to real ones, in the geometry of a real model:
// by default Llama-3-8B's, 32 layers of 8 KV heads of dimension 128, 4 query heads each. It is streamed in over gRPC as a prefill would,
// with a sample of its queries. Then every step asks one position of all layers, one call a layer, appending the position's
// rows in the same call: what a decode step's attention costs, transport included. Making the rows and the queries is not timed.
//
// Some calls are checked: their rows are made again, and their outputs compared with dense attention over all of them in float32.
// At last the daemon is killed, started again, and asked the same.
package million
