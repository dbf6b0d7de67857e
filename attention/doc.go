// Package attention computes: how tokens are grouped, scored and
// selected, and the softmax over them. Everything is a pure function over
// slices; nothing here knows where bytes lie. The plain Go loops are the
// specification that faster kernels are compared with.
//
// Shapes are written [rows][d], row-major. q is always already multiplied by
// the model's scale, so a score is q.k, then the softcap. "A group" is the
// query heads that share one KV head.
package attention
