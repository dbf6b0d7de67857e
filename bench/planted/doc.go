// Package planted tests sparse answers on contexts with planted answers, at
// the level of keys and values, without a model: RULER's kinds of task at
// lengths that no small model reads.
//
// # The contexts are synthetic
//
// Nothing here is a model's activation. A Haystack is one KV head whose keys
// and values are made to have what real ones have and what selection lives or
// dies by:
//
//   - rotary positions on part of the channel pairs; the others do not turn
//     and carry content, as with partial RoPE (or p-RoPE, arXiv 2410.06205), or as
//     the slowest pairs do where all of them turn;
//   - a decaying spectrum of content, channels of different size, and a few
//     channels with a large constant;
//   - clusters: a Zipf vocabulary of token types, topics that come back, a
//     context that drifts, and noise of the token's own;
//   - a sink: the first token takes a share of every query, and its value is small;
//   - values that follow keys weakly; everything rounded to bf16.
//
// Ordinary queries look for the content of some earlier token, each head for
// its own, not too sharply; they also make the metric, in the order of the
// text, so that no segment's metric knows a query that came after its seal.
// A query that looks for something planted points to it by Fisher's
// discriminant, as a trained head would, and just so strongly that the wanted
// share of the dense softmax falls on it. Planted tokens are otherwise as any other of a rare type:
// neither their keys' size nor their place gives them away.
//
// # Tasks
//
//   - single: one token, at depths spread evenly.
//   - multikey: one token among 16 distractors whose types correlate with its own by .5 to .9.
//   - multivalue: four tokens of equal score; all four values are wanted.
//   - multiquery: each head of the group looks for another token. In the other
//     tasks one head looks and the rest of its group asks ordinary queries.
//   - chain: four hops; the value found is the direction of the next query.
//     Each hop's query is made from the answer under test, so that errors feed on.
//   - cwe, fwe: thousands of tokens of equal score in classes with orthogonal
//     values; the ranking of the classes is read from the output. cwe: which 10 of 40
//     classes are 10 times as frequent; fwe: ranks 2 to 4 of 20 by Zipf with exponent 2.
//   - ordinary: ordinary queries, nothing planted.
//
// # Method
//
// The project's own path answers: tiers/seal makes segments of 2,048 tokens,
// bench/memtier holds them, server/sparse attends. The first 16 tokens and the
// newest 256 or more are exact. Truth is dense attention in float64 over the
// unquantised rows. An answer is read as the nearest of the sample's own codewords, its distractors' and 64
// others; what counts for retention is what dense attention decodes right.
//
// Comparators read unquantised rows and are charged as if these had 4 bits, which favours them:
//
//   - quest: blocks of 16 consecutive tokens, ranked by min/max bounds with each head
//     normalised, its bounds charged at 8 bits; quest-free: the bounds cost nothing;
//   - window: sinks and the newest tokens (StreamingLLM);
//   - oracle: the tokens with the largest true weight, found at no cost;
//   - k4v4: everything read at 4 bits: what the codec alone costs.
//
// What this cannot show is how a model uses its answers: it says whether a
// strong token among very many is found, not what a miss does to a text.
package planted
