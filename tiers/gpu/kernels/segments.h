// What the kernels of attention share: the tables, and how a query meets codes.
#pragma once
#include "device.h"

constexpr u32 kLeaf = 16, kPage = 64, kStep = 32;
constexpr u32 kBins = 256;      // tokens that share bins
constexpr u32 kPages = kBins / kPage;
constexpr u32 kLine = 64;       // bytes: 2 bits of 16 channels of a leaf
constexpr u32 kLevels = 4;      // lines of a group
constexpr u32 kFirst = 0xc0c0c0c0;  // the bits of four codes that a group's first line has
constexpr u32 kScale = 3;       // bytes of a value's scale
constexpr u32 kRows = 8;        // query rows of a warp
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLowest = -1e30f;  // of scores; what is masked

// Segment is one KV head of a sealed segment: where its planes lie. Names and sizes as in docs/format.md.
struct Segment {
  const u8 *steps, *k1, *k2, *k3, *k4, *k8, *v4, *v8, *pages;
  u32 stored;       // tokens
  int exponent;     // of the bins
  u32 body;         // of the tokens, those that are no outliers
  u32 low_leaf;     // the leaf with which k8 and v8 begin
};

// Where a segment's steps have the bins of its keys: by group of tokens, then by 16 channels 16 lower ends and 16 sizes.
template <u32 D> constexpr u32 kOrder = (D + D / 4 + D / 8 + kLine - 1) / kLine * kLine;

// Means is where a segment's pages lie: mean values [pages][D], then mean keys: bins, and 16 a leaf [D/16][2] lines; then of each page the scale and
// the spread of its values.
template <u32 D> struct Means {
  static constexpr u32 leaf = 2 * D / 16 * kLine;
  const u8 *values, *bins, *keys, *scales;

  METHOD Means(const u8 *pages, u32 stored) {
    u32 count = (stored + kPage - 1) / kPage;
    values = pages, bins = pages + count * D, keys = bins + 4 * D, scales = keys + (count + kLeaf - 1) / kLeaf * leaf;
  }
};

// Unit is a run of at most 16 leaves with the same bins. The first is of even number; skip of them, 0 or 1, are not attended.
struct Unit {
  u32 segment;
  u16 leaf;
  u8 leaves, skip;
};

// Split is a run of units, all of one KV head.
struct Split {
  u32 head, first, end;
};

// Rule is how few tokens rule a page's mass: the sum of the squares of their shares of it, raised by what is not known of their keys, and that part alone.
struct Rule {
  float all, noise;
};

constexpr float kShrink = 0.89f;

// Query rows lie in shared memory so far apart that equal channels of different rows are in different banks.
template <u32 D> constexpr u32 kPitch = D + 4;

// take_rows brings so many query rows from from to a block's shared memory; the others are zero.
template <u32 D> DEVICE void take_rows(const float *from, u32 rows, float *q) {
  UNROLL for (u32 i = 0; i < kRows * D / 128; i++) {
    u32 r = (i * 128 + THREAD) / D, c = (i * 128 + THREAD) % D;
    q[r * kPitch<D> + c] = r < rows ? from[r * D + c] : 0;
  }
  sync_block();
}

// WordUnit is what 16-bit words are units of, the largest of which stands for most: 0 if that tells nothing.
struct WordUnit {
  float unit, inverse;

  METHOD WordUnit(float most) {
    unit = divide(most, 32639.f, 1 / 32639.f);  // mostWord
    bool tells = unit > 0x1p-100f && unit <= 3.402823466e38f;
    inverse = divide(1, unit, reciprocal(unit));
    if (!tells) inverse = 0, unit = 0;
  }
};

constexpr float kRounder = 12582912.f;  // 1.5 2^23: what is added to it is rounded to an integer, in the lowest bits

// signed_bytes returns four words, which lie in the lowest bits, as upper bytes and lower ones.
DEVICE u32x2 signed_bytes(u32 (&words)[4]) {
  // Lower bytes as signed ones: the upper are of what is left, rounded.
  u32 low = pick_bytes(pick_bytes(words[0], words[1], 0x40), pick_bytes(words[2], words[3], 0x40), 0x5410);
  UNROLL for (u32 b = 0; b < 4; b++) words[b] += 128;
  u32 high = pick_bytes(pick_bytes(words[0], words[1], 0x51), pick_bytes(words[2], words[3], 0x51), 0x5410);
  return u32x2{high, low};
}

DEVICE float cap(float x, float softcap) {  // softcap tanh(x / softcap), in log2
  float e = exp2(x * (2 * kLog2e) * reciprocal(softcap));
  return (softcap - 2 * softcap * reciprocal(e + 1)) * kLog2e;
}
