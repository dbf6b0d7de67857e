// Package contexts measures a daemon that holds many sequences at once: a real
// kvtierd of its own, a process that is killed at the end, over gRPC.
//
// # What is stored
//
// Contexts have lengths between a least and a greatest whose shares fall as
// Zipf's law has them: one in x times as long is x times as rare. Groups of
// them share a prefix, half of the least length, by fork. Keys and values are
// made up, so that every row can be made again when an answer is checked: runs
// of 64 tokens belong to one of 16 topics, which lie in directions of their own
// in each context, layer and head; a key and a value are their topic's direction
// and noise. A query is a topic's direction and noise, so that attention goes to
// the tokens of a topic, as real attention goes to what belongs together.
//
// # What is asked
//
// Turns come at a fixed rate, whether there is one context or there are all of
// them. A turn goes to a context chosen at random and decodes some tokens: one
// call a layer, which appends the token's row and answers its queries. Some
// turns close the context and open it again before.
//
// With Options.Huge the same load is made again while another context, which may be much longer, has one call after
// the other: for everything that is stored of a layer, for one position and for many, for a share of it, and appends.
//
// # What is checked
//
// After a share of the turns one layer is asked once more, in mode exact, and
// the answer is compared with dense attention in float64 over the rows that were
// sent: its direction, and its log-sum-exp, which misses no token. Rows of
// another context, or rows that are not there, are far outside the tolerance;
// the error of 4-bit codes is well inside.
package contexts
