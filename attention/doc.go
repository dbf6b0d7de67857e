// Package attention computes: how tokens are grouped, scored and
// selected, and the softmax over them. Everything is a pure function over
// slices; nothing here knows where bytes lie. What answers queries runs on package
// kernels; what decides what is stored is plain Go loops, which compute the same bits everywhere.
//
// Shapes are written [rows][d], row-major. q is always already multiplied by
// the model's scale, so a score is q.k, then the softcap. "A group" is the
// query heads that share one KV head.
package attention
