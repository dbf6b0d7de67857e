// Package synth makes keys, values and queries of a model that does not exist, of any length, fast, and
// the same at every call: any block of tokens of any layer follows from the seed alone.
//
// # What is made
//
// A text is words of a Zipf vocabulary, runs of topics that come back, and a drift. Each is a vector of
// latents; with noise of a layer's own their sum is the layer's hidden state of a token. Every KV head has
// weights that take the hidden state to a key and to a value, as in a model: keys have a decaying spectrum, channels of
// different size and a few with a large constant; values follow keys in part, because they come from the same state.
// A quarter of the channel pairs turn with the position (RoPE); the first token is a sink, whose value is next to nothing.
//
// A query head asks for what resembles a mix of three things: what it always asks for, something that the
// topic at hand means to it, and something that the word at hand means to it. Topics jump and words come back: that is what makes
// a step's choice resemble those of the steps before. How sharp it is, and how much of its attention goes to the first
// tokens and to the newest ones, is that of a head of a real model: profiles.go holds what was measured.
//
// # How true it is
//
// Shape measures heads, real or made; 'kvbench shape' shows both side by side, and docs/million.md has the figures. Real
// heads could be measured up to 12,288 tokens. What lies beyond is taken to be alike: the spread of scores and the shares of
// the first and of the newest tokens stay what they are at that length.
package synth
