// Sealing of segments: what tiers/seal, attention and compress make of the rows of a KV head, to the last bit. So every sum here is added in the
// order in which Go adds it, products are rounded before they meet a sum (-ffp-contract=off), and quotients and roots are rounded correctly.
// A launch does a step for all jobs; a job is one KV head of one layer. docs/gpu.md describes the steps, kernels/seal.go calls them.
#include "device.h"

constexpr u32 D = HEAD_DIM, kQuads = D / 16, kGroups = D / 16;
constexpr u32 kLeaf = 16, kPage = 64, kStep = 256;
constexpr u32 kMost = 2048; // tokens of a segment
constexpr u32 kThreads = 256;
constexpr u32 kLines = D / 4, kFirst = (kGroups + 3) / 4, kMain = 2 * kGroups + 2 * kFirst;
constexpr u32 kThird = kGroups > 2 * kFirst + 1 ? kGroups - 2 * kFirst : 1;
constexpr u32 kOwn = D / kWarp; // channels of a lane, where a warp does a token
constexpr u32 kStepBytes = 4 * D, kOrderBytes = (D + D / 4 + D / 8 + 63) / 64 * 64;
constexpr u32 kMetaBytes = 4;
constexpr float kShrink2 = .89f; // compress.Shrink2

#define GLOBAL __attribute__((address_space(1)))
#define INLINE __attribute__((device, always_inline)) // of lambdas
#define ALIGN16 __attribute__((aligned(16)))
typedef GLOBAL float *Floats;
typedef GLOBAL u8 *Bytes;
typedef GLOBAL u16 *Halves;
typedef GLOBAL u32 *Words;
typedef GLOBAL double *Doubles;

// What all jobs of a batch share, and where their arrays lie: [jobs][..] each. kernels/seal.go has the same fields.
struct Batch {
  u64 rawK, rawV; // [layers][rows][heads][D] of type
  u64 weights;    // float [D][D], the metric; moments: float [D][D]
  u64 moments, weighted; // u8: the metric is not the identity
  u64 normals;    // float [splits][D]
  u64 queries;    // float [rows][D]
  u64 a, b, c, e, f; // float [stored][D]
  u64 tokens, proj;  // u16, float [stored]
  u64 mean;          // float [D]
  u64 pageMeans;     // float [pages][D], of keys
  u64 bins;          // float [groups][3][D]: lower ends, steps and their reciprocals, by place
  u64 places;        // u8 [D + kLines]: the place of each channel; of each line, its group and the level of its bits (4 bits each)
  u64 codes;         // u8 [stored][D], of keys, by place
  u64 feedback;      // float [D][D]; feedsBack: u32, whether there is any
  u64 feedsBack;
  u64 out, outBytes; // u8 [outBytes], of which:
  u64 order, steps, keys[5], values, lowValues, drains, pages, exponent, products, partials;
  u64 rows, sinks, heads, type; // rows of the segment, sinks among them
  u64 stored, body, splits, queryRows, low;
};

DEVICE u32 stored_of(const Batch *s) { return (u32)s->stored; }
DEVICE Floats slot(u64 base, const Batch *s, u32 job) { return (Floats)base + (u64)job * s->stored * D; }
DEVICE Bytes out_of(const Batch *s, u32 job) { return (Bytes)s->out + (u64)job * s->outBytes; }

DEVICE float root(float x) {
  float r;
  asm("sqrt.rn.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
DEVICE bool is_nan(float x) { return x != x; }
// Go's: what is no number stays so.
DEVICE float larger(float a, float b) { return is_nan(a) ? a : is_nan(b) ? b : a > b ? a : b; }

// Dot of two rows by the four lanes of a quad, which get the product: each has four of the sixteen sums.
template <typename A, typename B> DEVICE float quad_dot(A a, B b) {
  u32 lane = THREAD % 4;
  float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
  UNROLL for (u32 i = 0; i < kQuads; i++) {
    f32x4 x = a(4 * i + lane), y = b(4 * i + lane);
    s0 += x.x * y.x;
    s1 += x.y * y.y;
    s2 += x.z * y.z;
    s3 += x.w * y.w;
  }
  float q = (s0 + s2) + (s1 + s3);
  q += shuffle_xor(q, 2);
  return q + shuffle_xor(q, 1);
}
DEVICE auto row_of(Floats x) {
  return [x](u32 i) INLINE { return ((GLOBAL const f32x4 *)x)[i]; };
}
DEVICE auto row_of(const float *x) {
  return [x](u32 i) INLINE { return ((const f32x4 *)x)[i]; };
}

DEVICE void count_in(u32 *counter, u32 n) { asm volatile("red.shared.add.u32 [%0], %1;" ::"r"(shared_address(counter)), "r"(n) : "memory"); }

// Orders as numbers are; what is no number comes first.
DEVICE u32 ascending(float x) {
  u32 b = bits_of(x + 0.0f);
  return is_nan(x) ? 0 : b >> 31 ? ~b : b | 0x80000000;
}

// Reading, and rows in order of position.

DEVICE float widened(Bytes p, u32 i, u32 type) {
  if (type == 1) return ((Floats)p)[i];
  u32 h = ((Halves)p)[i];
  return type == 2 ? bits<float>(h << 16) : widen_half(h);
}

// a and b: the keys and values, as floats; proj: the squares of the values' norms; tokens: all in order.
KERNEL BOUNDS(kThreads, 4) void widen(const Batch *s) {
  u32 n = stored_of(s), job = BLOCK_Y, first = BLOCK_X * kPage, type = s->type;
  u64 row = s->heads * D, start = ((job / s->heads) * s->rows + s->sinks) * row + job % s->heads * D;
  Floats k = slot(s->a, s, job), v = slot(s->b, s, job);
  u32 size = type == 1 ? 4 : 2;
  ROLLED for (u32 i = THREAD; i < kPage * D; i += kThreads) {
    u32 t = first + i / D;
    if (t >= n) break;
    u64 at = (start + t * row + i % D) * size;
    k[t * D + i % D] = widened((Bytes)s->rawK + at, 0, type);
    v[t * D + i % D] = widened((Bytes)s->rawV + at, 0, type);
  }
  sync_block();
  u32 t = first + THREAD / 4, there = t < n ? t : n - 1;
  float norm = 0;
  if (t < n || first + kPage > n) { // whole warps
    Floats x = v + (t < n ? there : first) * D;
    norm = quad_dot(row_of(x), row_of(x));
  }
  if (t < n && THREAD % 4 == 0) {
    ((Floats)s->proj)[(u64)job * n + t] = norm;
    ((Halves)s->tokens)[(u64)job * n + t] = t;
  }
}

// mean: of all keys.
KERNEL BOUNDS(D, 1) void centre(const Batch *s) {
  u32 n = stored_of(s), job = BLOCK_X, j = THREAD;
  Floats k = slot(s->a, s, job);
  double sum = 0;
  _Pragma("unroll 16") for (u32 t = 0; t < n; t++) sum += k[t * D + j];
  ((Floats)s->mean)[job * D + j] = (float)(sum / n);
}

// Matrix products: each element is a sum in order of k.

constexpr u32 kTile = 64, kDepth = 16, kPad = 4;
struct Tiles {
  float a[kDepth][kTile + kPad], b[kDepth][kTile + kPad];
};

// Adds a tile's products: of thread (y, x) rows 4y.. and columns 4x..
DEVICE void tile_products(float (&sum)[4][4], const Tiles &t) {
  u32 y = THREAD / 16, x = THREAD % 16;
  UNROLL for (u32 l = 0; l < kDepth; l++) {
    f32x4 a = *(const f32x4 *)&t.a[l][4 * y], b = *(const f32x4 *)&t.b[l][4 * x];
    UNROLL for (u32 i = 0; i < 4; i++) UNROLL for (u32 j = 0; j < 4; j++) sum[i][j] += a[i] * b[j];
  }
}

// Rows [first, first + 64) of x, less mean unless it is none, times 64 columns of m [D][D].
DEVICE void times(Floats to, Floats x, const float *mean, Floats m, u32 n, Tiles &t) {
  u32 first = BLOCK_X / (D / kTile) * kTile, column = BLOCK_X % (D / kTile) * kTile;
  float sum[4][4] = {};
  ROLLED for (u32 l = 0; l < D; l += kDepth) {
    UNROLL for (u32 i = THREAD; i < kTile * kDepth; i += kThreads) {
      u32 r = i / kDepth, c = i % kDepth;
      float y = first + r < n ? x[(first + r) * D + l + c] : 0;
      t.a[c][r] = mean && first + r < n ? y - mean[l + c] : y;
      t.b[i / kTile][i % kTile] = m[(l + i / kTile) * D + column + i % kTile];
    }
    sync_block();
    tile_products(sum, t);
    sync_block();
  }
  u32 y = THREAD / 16, z = THREAD % 16;
  UNROLL for (u32 i = 0; i < 4; i++) {
    u32 r = first + 4 * y + i;
    if (r < n) *(GLOBAL f32x4 *)&to[r * D + column + 4 * z] = f32x4{sum[i][0], sum[i][1], sum[i][2], sum[i][3]};
  }
}

// c: the keys less their mean, in the metric.
KERNEL BOUNDS(kThreads, 3) void apply(const Batch *s) {
  SHARED Tiles t;
  SHARED float mean[D];
  u32 n = stored_of(s), job = BLOCK_Y;
  Floats x = slot(s->a, s, job), y = slot(s->c, s, job);
  if (THREAD < D) mean[THREAD] = ((Floats)s->mean)[job * D + THREAD];
  sync_block();
  if (((Bytes)s->weighted)[job]) return times(y, x, mean, (Floats)s->weights + (u64)job * D * D, n, t);
  u32 first = BLOCK_X / (D / kTile) * kTile, column = BLOCK_X % (D / kTile) * kTile;
  ROLLED for (u32 i = THREAD; i < kTile * kTile; i += kThreads) {
    u32 r = first + i / kTile, c = column + i % kTile;
    if (r < n) y[r * D + c] = x[r * D + c] - mean[c];
  }
}

// Grouping (attention/cluster.go).

struct Selection {
  u32 counts[256];
  u64 limit;
  u32 left;
};

// The limit below which the first count of m keys lie, of keys that all differ and have 48 bits. All threads call it. Unless count is 0, it
// waits for all of them before it looks at a key.
template <typename Key> DEVICE u64 nth(u32 m, u32 count, Key key, Selection &s) {
  if (count == 0) return 0;
  if (THREAD == 0) s.limit = 0, s.left = count;
  ROLLED for (u32 shift = 40;; shift -= 8) {
    s.counts[THREAD] = 0;
    sync_block();
    u64 limit = s.limit;
    ROLLED for (u32 i = THREAD; i < m; i += kThreads) {
      u64 k = key(i);
      if (k >> shift >> 8 == limit >> shift >> 8) count_in(&s.counts[k >> shift & 255], 1);
    }
    sync_block();
    if (THREAD < kWarp) {
      u32 own = 0, left = s.left;
      UNROLL for (u32 i = 0; i < 8; i++) own += s.counts[THREAD * 8 + i];
      u32 below = own;
      UNROLL for (u32 step = 1; step < kWarp; step *= 2) {
        u32 x = shuffle(below, THREAD >= step ? THREAD - step : THREAD);
        if (THREAD >= step) below += x;
      }
      below -= own;
      sync_warp(); // all have read what is left
      if (below < left && left <= below + own) { // one lane
        u32 digit = THREAD * 8;
        ROLLED for (; below + s.counts[digit] < left; digit++) below += s.counts[digit];
        left -= below;
        limit |= (u64)digit << shift;
        bool all = s.counts[digit] == left;
        s.left = all ? 0 : left;
        s.limit = all ? limit + (1ull << shift) : limit;
      }
    }
    sync_block();
    if (s.left == 0) return s.limit;
  }
}

DEVICE u64 below_lanes(u32 mask) { return mask & ((1u << THREAD % kWarp) - 1); }

// Sets tokens apart. first: the drains, of the smallest values, to the end. Else the outliers, by proj: the order becomes body, drains, outliers.
KERNEL BOUNDS(kThreads, 4) void apart(const Batch *s, u32 first, u32 drains) {
  SHARED Selection chosen;
  SHARED u32 keys[kMost];
  u32 n = stored_of(s), job = BLOCK_X, count = first ? drains : n - (u32)s->body - drains;
  Halves tokens = (Halves)s->tokens + (u64)job * n;
  Floats proj = (Floats)s->proj + (u64)job * n;
  ROLLED for (u32 i = THREAD; i < n; i += kThreads) keys[i] = ascending(proj[i]);
  sync_block();
  constexpr u32 kDrain = 0xffffffff; // no number's
  if (!first) {
    if (THREAD < drains) keys[tokens[n - drains + THREAD]] = kDrain;
    sync_block();
  }
  auto key = [&](u32 i) INLINE { return (u64)keys[i] << 16 | i; };
  u64 limit = nth(n, count, key, chosen);
  if (THREAD >= kWarp) return;
  u32 body = 0, drain = first ? 0 : (u32)s->body, out = first ? n - drains : drain + drains;
  ROLLED for (u32 base = 0; base < n; base += kWarp) {
    u32 i = base + THREAD;
    bool is = i < n, taken = is && key(i) < limit, drained = is && keys[i] == kDrain, rest = is && !taken && !drained;
    u32 t = ballot(taken), d = ballot(drained), r = ballot(rest);
    if (rest) tokens[body + count_ones(below_lanes(r))] = i;
    if (drained) tokens[drain + count_ones(below_lanes(d))] = i;
    if (taken) tokens[out + count_ones(below_lanes(t))] = i;
    body += count_ones(r), drain += count_ones(d), out += count_ones(t);
  }
}

// A run of tokens that is to be split, the larger half first.
struct Node {
  u32 from, count, left, vector;
};

struct Split {
  Selection chosen;
  u16 ids[2][kMost];
  u32 keys[kMost]; // of projections; before, how far tokens lie along a direction
  alignas(16) float w[D], mean[D], next[D];
};

// The sum of tokens' rows, each times its weight, for channel THREAD; total becomes that of the weights.
template <typename Weight> DEVICE float sum_rows(Floats x, const u16 *ids, u32 m, Weight weight, float &total) {
  float sum = 0;
  total = 0;
  _Pragma("unroll 16") for (u32 i = 0; i < m; i++) {
    float w = weight(i);
    total += w;
    sum += w * x[ids[i] * D + THREAD];
  }
  return sum;
}
DEVICE float mean_rows(Floats x, const u16 *ids, u32 m) {
  float same = 1 / (float)m, total;
  return sum_rows(x, ids, m, [=](u32) INLINE { return same; }, total);
}

// How far tokens lie along w, less off: as use(i, dot) wants it.
template <typename Use> DEVICE void along(Floats x, const u16 *ids, u32 m, const float *w, Use use) {
  ROLLED for (u32 base = 0; base < m; base += kThreads / 4) {
    u32 i = base + THREAD / 4;
    float dot = quad_dot(row_of(x + ids[i < m ? i : m - 1] * D), row_of(w));
    if (i < m && THREAD % 4 == 0) use(i, dot);
  }
}

KERNEL BOUNDS(kThreads, 2) void split(const Batch *s, const Node *nodes) {
  SHARED Split z;
  Node node = nodes[BLOCK_X];
  u32 n = stored_of(s), job = BLOCK_Y, m = node.count, now = 0;
  Floats x = slot(s->c, s, job);
  Halves tokens = (Halves)s->tokens + (u64)job * n + node.from;
  ROLLED for (u32 i = THREAD; i < m; i += kThreads) z.ids[0][i] = tokens[i];
  if (THREAD < D) z.w[THREAD] = ((Floats)s->normals)[((u64)job * s->splits + node.vector) * D + THREAD];
  sync_block();
  if (THREAD < D) z.mean[THREAD] = mean_rows(x, z.ids[0], m);
  sync_block();
  ROLLED for (u32 i = 0; i < 6; i++) { // power iteration
    float off = quad_dot(row_of(z.mean), row_of(z.w));
    along(x, z.ids[0], m, z.w, [&](u32 i, float dot) INLINE { z.keys[i] = bits_of(dot - off); });
    sync_block();
    if (THREAD < D) {
      float total, sum = sum_rows(x, z.ids[0], m, [&](u32 i) INLINE { return bits<float>(z.keys[i]); }, total);
      z.next[THREAD] = sum + -total * z.mean[THREAD];
    }
    sync_block();
    float norm = root(quad_dot(row_of(z.next), row_of(z.next)));
    if (norm == 0 || norm == __builtin_inff()) break;
    if (THREAD < D) z.w[THREAD] = z.next[THREAD] / norm;
    sync_block();
  }
  ROLLED for (u32 i = 0;; i++) {
    const u16 *ids = z.ids[now];
    along(x, ids, m, z.w, [&](u32 i, float dot) INLINE { z.keys[i] = ascending(dot); });
    auto key = [&](u32 i) INLINE { return (u64)z.keys[i] << 16 | ids[i]; };
    u64 limit = nth(m, node.left, key, z.chosen);
    now ^= 1;
    if (THREAD < kWarp) { // both halves keep the order they came in
      u32 lower = 0, upper = node.left;
      ROLLED for (u32 base = 0; base < m; base += kWarp) {
        u32 i = base + THREAD;
        bool is = i < m, taken = is && key(i) < limit;
        u32 t = ballot(taken), r = ballot(is && !taken);
        if (is) z.ids[now][taken ? lower + count_ones(below_lanes(t)) : upper + count_ones(below_lanes(r))] = ids[i];
        lower += count_ones(t), upper += count_ones(r);
      }
    }
    sync_block();
    if (i == 3) break;
    if (THREAD < D) z.w[THREAD] = mean_rows(x, z.ids[now] + node.left, m - node.left) - z.mean[THREAD];
    sync_block();
  }
  ROLLED for (u32 i = THREAD; i < m; i += kThreads) tokens[i] = z.ids[now][i];
}

// proj: how near the tokens of a leaf are to its mean; the leaves are the first m tokens.
KERNEL BOUNDS(D, 1) void stray(const Batch *s, u32 m) {
  SHARED u16 ids[kLeaf];
  SHARED ALIGN16 float mean[D];
  u32 n = stored_of(s), job = BLOCK_Y, from = BLOCK_X * kLeaf, count = m - from < kLeaf ? m - from : kLeaf;
  Floats x = slot(s->c, s, job);
  if (THREAD < count) ids[THREAD] = ((Halves)s->tokens)[(u64)job * n + from + THREAD];
  sync_block();
  mean[THREAD] = mean_rows(x, ids, count);
  sync_block();
  if (THREAD >= 4 * kLeaf) return;
  u32 i = THREAD / 4, token = ids[i < count ? i : 0];
  auto row = row_of(x + token * D);
  auto delta = [&](u32 c) INLINE { return row(c) - ((const f32x4 *)mean)[c]; };
  float far = quad_dot(delta, delta);
  if (i < count && THREAD % 4 == 0) ((Floats)s->proj)[(u64)job * n + token] = -far;
}

// Keys (compress/keyplanes.go, keysteps.go).

// c: the keys in stored order. And the order itself.
KERNEL BOUNDS(kThreads, 4) void gather(const Batch *s) {
  u32 n = stored_of(s), job = BLOCK_Y, first = BLOCK_X * kPage;
  Floats from = slot(s->a, s, job), to = slot(s->c, s, job);
  Halves tokens = (Halves)s->tokens + (u64)job * n, order = (Halves)(out_of(s, job) + s->order);
  ROLLED for (u32 i = THREAD; i < kPage * D; i += kThreads) {
    u32 place = first + i / D;
    if (place >= n) break;
    to[place * D + i % D] = from[tokens[place] * D + i % D];
    if (i % D == 0) order[place] = tokens[place] + s->sinks;
  }
}

// Places [lo, hi) of a group of tokens that share steps.
struct Run {
  u32 lo, hi;
};
DEVICE u32 step_groups(u32 tokens) { return (tokens + kStep - 1) / kStep; }
DEVICE Run step_group(const Batch *s, u32 g) {
  u32 body = s->body, n = s->stored, of_body = step_groups(body);
  u32 lo = g < of_body ? g * kStep : body + (g - of_body) * kStep, end = g < of_body ? body : n;
  return Run{lo, lo + kStep < end ? lo + kStep : end};
}

DEVICE u16 to_half(float x) { // compress.f16From32 of what is finite
  u32 b = bits_of(x), sign = b >> 16 & 0x8000;
  b &= 0x7fffffff;
  if (b >= 0x47800000) return sign | 0x7c00;
  if (b < 0x38800000) return sign | (bits_of(bits<float>(b) + .5f) - 0x3f000000);
  b += 0xfff + (b >> 13 & 1);
  return sign | ((b - 0x38000000) >> 13);
}
// The nearest binary16 not above x, kept finite.
DEVICE u32 half_below(double x) {
  u32 h = to_half((float)x);
  ROLLED while (h != 0xfbff && (double)widen_half(h) > x) h = (h & 0x7fff) == 0 ? 0x8001 : h & 0x8000 ? h + 1 : h - 1;
  return (h & 0x7fff) > 0x7bff ? (h & 0x8000) | 0x7bff : h;
}
DEVICE double power_of_two(int e) { return __builtin_bit_cast(double, (u64)(1023 + e) << 52); }

// The bins of a channel whose values lie in [lo, hi] (compress.FitKeySteps), as they are read, from and step; at is its group's line, j its place in it.
DEVICE void fit_bins(Bytes at, u32 j, float lo, float hi, int exponent, float &from, float &step) {
  constexpr float kMostKey = 0x1p126f;
  double unit = power_of_two(exponent), per = power_of_two(-exponent);
  lo = lo < -kMostKey ? -kMostKey : lo > kMostKey ? kMostKey : lo;
  hi = hi < -kMostKey ? -kMostKey : hi > kMostKey ? kMostKey : hi;
  u32 low = half_below((double)(lo + 0.0f) * per);
  from = (float)((double)widen_half(low) * unit);
  double width = ((double)hi - (double)from) / 256;
  width = width > 0x1p-126 ? width : 0x1p-126;
  u32 wide = half_below(-(width * per)) ^ 0x8000;
  step = (float)((double)widen_half(wide) * unit);
  at += 2 * j;
  at[0] = low, at[1] = low >> 8, at[32] = wide, at[33] = wide >> 8;
}

struct Order {
  float importance[D], square[D];
  u32 largest;
  u8 channels[D], lines[kLines], level[kGroups];
  double weight[kGroups];
  float scatter[kGroups]; // roots of mean squares
};

// The variance that 2 bits more of a channel take away, by the bits known (compress.KeyNoise).
DEVICE float gained(u32 level) {
  float noise[5] = {1.f / 45, (float)(.14 / 31), 1.f / (12 << 8), 1.f / (12 << 12), 1.f / (12 << 16)};
  return level == 0 ? noise[0] - noise[1] : level == 1 ? noise[1] - noise[2] : level == 2 ? noise[2] - noise[3] : noise[3] - noise[4];
}

// The order of the keys' bits, and the steps of each group.
KERNEL BOUNDS(D, 1) void arrange(const Batch *s) {
  SHARED Order z;
  u32 n = stored_of(s), job = BLOCK_X, j = THREAD, groups = step_groups(s->body) + step_groups(n - (u32)s->body);
  Floats k = slot(s->c, s, job), bins = (Floats)s->bins + (u64)job * groups * 3 * D;
  if (j == 0) z.largest = 0;
  float spread = 0;
  u32 largest = 0;
  ROLLED for (u32 g = 0; g < groups; g++) {
    Run run = step_group(s, g);
    double sum = 0;
    float lo = k[run.lo * D + j], hi = lo;
    _Pragma("unroll 16") for (u32 t = run.lo; t < run.hi; t++) {
      float x = k[t * D + j];
      u32 size = bits_of(x) & 0x7fffffff;
      sum += x;
      lo = x < lo ? x : lo, hi = x > hi ? x : hi;
      largest = size > largest ? size : largest;
    }
    float mean = (float)(sum / (run.hi - run.lo));
    _Pragma("unroll 16") for (u32 t = run.lo; t < run.hi; t++) {
      float delta = k[t * D + j] - mean;
      spread += delta * delta;
    }
    bins[g * 3 * D + j] = lo, bins[(g * 3 + 1) * D + j] = hi;
  }
  float square = ((Floats)s->moments)[(u64)job * D * D + j * D + j] + .1f / (float)D;
  z.importance[j] = spread * (square / (float)n);
  z.square[j] = square;
  sync_block();
  asm volatile("red.shared.max.u32 [%0], %1;" ::"r"(shared_address(&z.largest)), "r"(largest) : "memory");
  u32 place = 0;
  _Pragma("unroll 4") for (u32 i = 0; i < D; i++) place += z.importance[i] > z.importance[j] || (z.importance[i] == z.importance[j] && i < j);
  z.channels[place] = j;
  Bytes places = (Bytes)s->places + job * (D + kLines), steps = out_of(s, job) + s->steps;
  places[j] = place;
  sync_block();
  u32 channel = z.channels[j];
  if (j < kGroups) {
    double sum = 0, squares = 0;
    ROLLED for (u32 i = 0; i < 16; i++) {
      u32 c = z.channels[16 * j + i];
      sum += z.importance[c], squares += z.square[c];
    }
    z.weight[j] = sum;
    z.scatter[j] = root((float)(sum / squares));
    z.level[j] = 0;
  }
  sync_block();
  if (j == 0) {
    u32 unknown = kGroups;
    ROLLED for (u32 i = 0; i < kLines; i++) {
      u32 best = 0;
      double most = -1;
      ROLLED for (u32 g = 0; g < kGroups; g++) {
        u32 l = z.level[g];
        if (l == 4 || (l > 0 && i + unknown >= 2 * kGroups && unknown > 0)) continue;
        double gain = z.weight[g] * (double)gained(l);
        if (gain > most) best = g, most = gain;
      }
      if (z.level[best] == 0) unknown--;
      z.lines[i] = best | z.level[best] << 4;
      z.level[best]++;
    }
  }
  sync_block();
  steps[j] = channel;
  if (j < kLines) steps[D + j] = z.lines[j] & 15, places[D + j] = z.lines[j];
  int exponent = 0;
  if (z.largest != 0) {
    exponent = (int)(z.largest >> 23) - 126 - 15;
    exponent = exponent < -110 ? -110 : exponent > 113 ? 113 : exponent;
  }
  if (j == 0) *(GLOBAL int *)(out_of(s, job) + s->exponent) = exponent;
  if (j < kGroups) {
    double y = (double)z.scatter[j] * power_of_two(-exponent);
    u32 half = half_below(-(y < 65504 ? y : 65504)) ^ 0x8000;
    steps[D + kLines + 2 * j] = half, steps[D + kLines + 2 * j + 1] = half >> 8;
  }
  ROLLED for (u32 g = 0; g < groups; g++) {
    float lo = bins[g * 3 * D + channel], hi = bins[(g * 3 + 1) * D + channel];
    sync_block(); // all have read theirs
    float from, step;
    fit_bins(steps + kOrderBytes + g * kStepBytes + j / 16 * 64, j % 16, lo, hi, exponent, from, step);
    bins[g * 3 * D + j] = from, bins[(g * 3 + 1) * D + j] = step, bins[(g * 3 + 2) * D + j] = 1 / step;
  }
}

// What rounding errors of channels are made up for by those behind them (compress/keyfeedback.go): an elimination in float64, for which the room of
// the products serves.
KERNEL BOUNDS(kThreads, 2) void feed(const Batch *s) {
  SHARED u8 channels[D];
  SHARED double floor;
  SHARED u32 none;
  u32 job = BLOCK_X;
  Bytes places = (Bytes)s->places + job * (D + kLines);
  Floats moment = (Floats)s->moments + (u64)job * D * D, f = (Floats)s->feedback + (u64)job * D * D;
  Doubles a = (Doubles)(out_of(s, job) + s->products);
  if (THREAD < D) channels[places[THREAD]] = THREAD;
  if (THREAD == 0) {
    double sum = 0;
    _Pragma("unroll 16") for (u32 i = 0; i < D; i++) sum += (double)moment[i * D + i] / D;
    floor = sum;
    none = !(sum > 0) || *(GLOBAL int *)(out_of(s, job) + s->exponent) > 64;
    ((Words)s->feedsBack)[job] = !none;
  }
  sync_block();
  if (none) return;
  ROLLED for (u32 at = THREAD; at < D * D; at += kThreads) {
    u32 i = at / D, j = at % D;
    double x = moment[channels[i] * D + channels[j]];
    a[at] = i == j ? x + floor : x;
    f[at] = 0;
  }
  sync_block();
  ROLLED for (u32 j = D - 1; j > 0; j--) {
    GLOBAL const double *last = a + j * D;
    double least = last[j];
    ROLLED for (u32 at = THREAD; at < j * D; at += kThreads) {
      u32 i = at / D, k = at % D;
      if (k > i) continue;
      double part = last[i] / least;
      if (k == 0) f[i * D + j] = (float)part;
      a[at] -= part * last[k];
    }
    sync_block();
  }
}

// A bin of a key's channel, before it is rounded down.
DEVICE float clipped(float y, float least, float most) { return y < least ? least : y > most ? most : y; }

// The codes of keys. A warp does a token, a lane every 32nd channel; with feedback they wait for each other's errors.
KERNEL BOUNDS(kThreads, 3) void code(const Batch *s) {
  constexpr float kMostFeedback = 4; // kernels.MostFeedback
  u32 n = stored_of(s), job = BLOCK_Y, lane = THREAD % kWarp, t = BLOCK_X * (kThreads / kWarp) + THREAD / kWarp, body = s->body;
  if (t >= n) return;
  u32 g = t < body ? t / kStep : step_groups(body) + (t - body) / kStep, groups = step_groups(body) + step_groups(n - body);
  Bytes places = (Bytes)s->places + job * (D + kLines), codes = (Bytes)s->codes + ((u64)job * n + t) * D;
  Floats k = slot(s->c, s, job) + t * D, bins = (Floats)s->bins + ((u64)job * groups + g) * 3 * D;
  if (!s->low || !((Words)s->feedsBack)[job]) {
    UNROLL for (u32 i = 0; i < kOwn; i++) {
      u32 c = i * kWarp + lane, p = places[c];
      codes[p] = (u32)clipped((k[c] - bins[p]) * bins[2 * D + p], 0, 255);
    }
    return;
  }
  Floats f = (Floats)s->feedback + (u64)job * D * D;
  Bytes channels = out_of(s, job) + s->steps;
  float row[kOwn], target[kOwn], lo[kOwn], step[kOwn], inverse[kOwn];
  UNROLL for (u32 i = 0; i < kOwn; i++) {
    u32 p = i * kWarp + lane;
    row[i] = target[i] = k[channels[p]];
    lo[i] = bins[p], step[i] = bins[D + p], inverse[i] = bins[2 * D + p];
  }
  UNROLL for (u32 i = 0; i < kOwn; i++) ROLLED for (u32 l = 0; l < kWarp; l++) {
    float bin = (row[i] - lo[i]) * inverse[i];
    u32 c = (u32)clipped(clipped((target[i] - lo[i]) * inverse[i], bin - kMostFeedback, bin + kMostFeedback), 0, 255);
    float e = shuffle(row[i] - (lo[i] + ((float)c + .5f) * step[i]), l);
    if (lane == l) codes[i * kWarp + l] = c;
    UNROLL for (u32 j = i; j < kOwn; j++) {
      float add = e * f[(i * kWarp + l) * D + j * kWarp + lane];
      if (j > i || lane > l) target[j] += add;
    }
  }
}

// How many of the first lines of a leaf are of a group.
DEVICE u32 known(const u8 *lines, u32 group, u32 first) {
  u32 level = 0;
  ROLLED for (u32 i = 0; i < first; i++) level += (lines[i] & 15) == group;
  return level;
}

// The planes of a leaf's keys; and b: the keys as they are read without the low planes, if somebody asks.
KERNEL BOUNDS(128, 8) void pack(const Batch *s) {
  SHARED u8 lines[kLines], channels[D], level[kGroups];
  SHARED ALIGN16 u8 codes[kLeaf][D];
  u32 n = stored_of(s), job = BLOCK_Y, leaf = BLOCK_X, first = leaf * kLeaf, body = s->body, drain = body / kLeaf;
  bool drained = body < n && leaf == drain;
  u32 g = first < body ? first / kStep : step_groups(body) + (first - body) / kStep;
  u32 groups = step_groups(body) + step_groups(n - body);
  Bytes places = (Bytes)s->places + job * (D + kLines), out = out_of(s, job);
  Bytes from = (Bytes)s->codes + ((u64)job * n + first) * D;
  Floats bins = (Floats)s->bins + ((u64)job * groups + g) * 3 * D, back = slot(s->b, s, job);
  ROLLED for (u32 i = THREAD; i < D; i += 128) channels[i] = out[s->steps + i];
  if (THREAD < kLines) lines[THREAD] = places[D + THREAD];
  sync_block();
  if (THREAD < kGroups) level[THREAD] = drained ? 4 : known(lines, THREAD, kMain);
  sync_block();
  ROLLED for (u32 i = THREAD; i < kLeaf * D; i += 128) {
    u32 t = i / D, p = i % D, code = 0;
    if (first + t < n) {
      code = from[i];
      if (s->queryRows) {
        u32 bits = level[p / 16];
        float at = (float)(code & 0xff00 >> 2 * bits & 0xff) + (float)(256u >> 2 * bits) / 2;
        if (bits == 1) at = 128 + (at - 128) * kShrink2;
        back[(first + t) * D + channels[p]] = bins[p] + at * bins[D + p];
      }
    }
    codes[t][p] = code;
  }
  sync_block();
  ROLLED for (u32 i = THREAD; i < kLeaf * kLines; i += 128) {
    u32 line = i / kLeaf, t = i % kLeaf, group = lines[line] & 15, shift = 6 - 2 * (lines[line] >> 4), word = 0;
    UNROLL for (u32 r = 0; r < 4; r++) word |= (*(const u32 *)&codes[t][group * 16 + 4 * r] >> shift & 0x03030303) << 2 * r;
    u32 plane = line < kFirst ? 0 : line < 2 * kFirst ? 1 : line < 2 * kFirst + kThird ? 2 : line < kMain ? 3 : 4;
    u32 before = plane == 0 ? 0 : plane == 1 ? kFirst : plane == 2 ? 2 * kFirst : plane == 3 ? 2 * kFirst + kThird : kMain;
    u32 per = plane < 2 ? kFirst : plane == 2 ? kThird : plane == 3 ? kMain - 2 * kFirst - kThird : kLines - kMain;
    u32 at = (line - before) * 64 + 4 * t;
    if (plane < 4 || s->low) *(Words)(out + s->keys[plane] + leaf * per * 64 + at) = word;
    if (plane == 4 && drained) *(Words)(out + s->drains + at) = word;
  }
}

// Values (compress/rotate.go, values.go).

// The sign of a channel in the rotation.
DEVICE bool negative(u32 i) {
  u64 z = (u64)(i + 1) * 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return (z ^ z >> 31) >> 63;
}

DEVICE void rotate(float (&x)[kOwn], u32 lane) {
  constexpr float kNorm = D == 64 ? .125f : D == 256 ? .0625f : (float)(1 / 11.313708498984761);
  UNROLL for (u32 i = 0; i < kOwn; i++) x[i] *= negative(lane * kOwn + i) ? -kNorm : kNorm;
  UNROLL for (u32 h = 1; h < kOwn; h *= 2) UNROLL for (u32 i = 0; i < kOwn; i++) {
    if (i & h) continue;
    float a = x[i], b = x[i + h];
    x[i] = a + b, x[i + h] = a - b;
  }
  UNROLL for (u32 h = 1; h < kWarp; h *= 2) UNROLL for (u32 i = 0; i < kOwn; i++) {
    float other = shuffle_xor(x[i], h);
    x[i] = lane & h ? other - x[i] : x[i] + other;
  }
}

// a: the values in stored order, rotated; their scales and codes. A warp does a token.
KERNEL BOUNDS(kThreads, 4) void quantise(const Batch *s) {
  SHARED u8 codes[kThreads / kWarp][D];
  u32 n = stored_of(s), job = BLOCK_Y, warp = THREAD / kWarp, lane = THREAD % kWarp, place = BLOCK_X * (kThreads / kWarp) + warp;
  if (place >= n) return;
  u32 token = ((Halves)s->tokens)[(u64)job * n + place];
  Floats from = slot(s->b, s, job) + token * D + lane * kOwn, to = slot(s->a, s, job) + place * D + lane * kOwn;
  constexpr float kMostValue = 0x1p120f, kLeast = 0x1p-126f;
  float x[kOwn], raw[kOwn];
  bool clipped = false;
  UNROLL for (u32 i = 0; i < kOwn; i++) {
    raw[i] = from[i];
    x[i] = raw[i] < -kMostValue ? -kMostValue : raw[i] > kMostValue ? kMostValue : raw[i];
    clipped |= x[i] != raw[i];
  }
  rotate(x, lane);
  if (any(clipped)) {
    rotate(raw, lane);
  } else {
    UNROLL for (u32 i = 0; i < kOwn; i++) raw[i] = x[i];
  }
  float lo = 0, hi = 0;
  UNROLL for (u32 i = 0; i < kOwn; i++) {
    to[i] = raw[i];
    lo = x[i] < lo ? x[i] : lo, hi = x[i] > hi ? x[i] : hi;
  }
  UNROLL for (u32 h = 1; h < kWarp; h *= 2) {
    float a = shuffle_xor(lo, h), b = shuffle_xor(hi, h);
    lo = a < lo ? a : lo, hi = b > hi ? b : hi;
  }
  float step = (hi - lo) / 255;
  step = step > kLeast ? step : kLeast;
  u32 stored = (bits_of(step) + 0x7fff) & ~0x7fffu;
  step = bits<float>(stored);
  float zero = __builtin_ceilf(-lo / step), inverse = 1 / step;
  UNROLL for (u32 i = 0; i < kOwn; i++) {
    float y = x[i] * inverse + zero;
    codes[warp][lane * kOwn + i] = (u32)(y < 0 ? 0 : y > 255 ? 255 : y);
  }
  sync_warp();
  constexpr u32 kRow = D / 2;
  u32 page = place / kPage, in = place % kPage, tokens = n - page * kPage < kPage ? n - page * kPage : kPage;
  Bytes out = out_of(s, job), at = out + s->values + page * kPage * (3 + kRow);
  if (lane == 0) at[3 * in] = stored >> 15, at[3 * in + 1] = stored >> 23, at[3 * in + 2] = (u32)zero;
  at += 3 * tokens + in * kRow;
  u32 body = s->body, drain = place - body;
  ROLLED for (u32 i = lane; i < kRow; i += kWarp) {
    u32 p = codes[warp][i], q = codes[warp][i + kRow], low = (p & 15) | (q << 4 & 0xf0);
    at[i] = p >> 4 | (q & 0xf0);
    if (s->low) out[s->lowValues + place * kRow + i] = low;
    if (place >= body && drain < kLeaf) out[s->drains + (kLines - kMain) * 64 + drain * kRow + i] = low;
  }
}

// Means of pages (attention/means.go).

// The least bfloat16 that is not below x, as its 16 bits.
DEVICE u32 bf16_above(float x) {
  u32 b = bits_of(x);
  if (b & 0xffff) b = (b & 0xffff0000) + 0x10000;
  return (b < 0x7f7f0000 ? b : 0x7f7f0000) >> 16;
}

struct Page {
  u32 most[D / kWarp]; // of each warp
  float spreads[kPage];
};

// Where what is known of pages lies, behind the rows of mean values: mean keys, the scales and spreads of values, the spreads of keys.
constexpr u32 kMeanLeaf = 2 * kGroups * 64;
DEVICE u32 mean_keys_at(u32 pages) { return pages * D; }
DEVICE u32 value_meta_at(u32 pages) { return mean_keys_at(pages) + kStepBytes + (pages + kLeaf - 1) / kLeaf * kMeanLeaf; }
DEVICE u32 key_spreads_at(u32 pages) { return value_meta_at(pages) + pages * kMetaBytes; }

// The mean of rows [lo, hi) in this thread's channel.
DEVICE float column_mean(Floats x, u32 lo, u32 hi) {
  double sum = 0;
  _Pragma("unroll 16") for (u32 t = lo; t < hi; t++) sum += x[t * D + THREAD];
  return (float)(sum / (hi - lo));
}

// The mean of spreads, rounded up.
DEVICE void mean_spread(const float *spreads, u32 count, Bytes to) {
  double sum = 0;
  ROLLED for (u32 i = 0; i < count; i++) sum += spreads[i];
  u32 half = bf16_above((float)(sum / count));
  to[0] = half, to[1] = half >> 8;
}

// pageMeans; f: what values differ from their page's mean by. And the mean values, their scales and spreads.
KERNEL BOUNDS(D, 1) void means(const Batch *s) {
  SHARED Page z;
  u32 n = stored_of(s), job = BLOCK_Y, page = BLOCK_X, pages = (n + kPage - 1) / kPage, lo = page * kPage, count = n - lo < kPage ? n - lo : kPage, j = THREAD;
  Bytes out = out_of(s, job) + s->pages, meta = out + value_meta_at(pages) + page * kMetaBytes;
  ((Floats)s->pageMeans)[((u64)job * pages + page) * D + j] = column_mean(slot(s->c, s, job), lo, lo + count);
  Floats x = slot(s->a, s, job), values = slot(s->f, s, job);
  float mean = column_mean(x, lo, lo + count);
  _Pragma("unroll 16") for (u32 t = lo; t < lo + count; t++) values[t * D + j] = x[t * D + j] - mean;
  u32 largest = bits_of(mean) & 0x7fffffff; // of what is no number it is larger than of any
  UNROLL for (u32 h = 1; h < kWarp; h *= 2) {
    u32 other = shuffle_xor(largest, h);
    largest = other > largest ? other : largest;
  }
  if (j % kWarp == 0) z.most[j / kWarp] = largest;
  sync_block();
  UNROLL for (u32 i = 0; i < D / kWarp; i++) largest = z.most[i] > largest ? z.most[i] : largest;
  // A mean that is no number has the largest scale, whatever the others are, and code 0.
  u32 half = largest > 0x7f800000 ? 0x7f7f : bf16_above(bits<float>(largest) / 127);
  if (j == 0) meta[0] = half, meta[1] = half >> 8;
  int code = 0;
  if (half != 0 && !is_nan(mean)) {
    float y = __builtin_rintf(mean / bits<float>(half << 16));
    code = (int)(y < -127 ? -127 : y > 127 ? 127 : y);
  }
  out[page * D + j] = (u8)code;
  ROLLED for (u32 base = 0; base < kPage; base += D / 4) {
    u32 i = base + THREAD / 4, t = lo + (i < count ? i : 0);
    float y = quad_dot(row_of(values + t * D), row_of(values + t * D));
    if (THREAD % 4 == 0) z.spreads[i] = y;
  }
  sync_block();
  if (THREAD == 0) mean_spread(z.spreads, count, meta + 2);
}

// The mean keys (compress/meankeys.go); pageMeans become what they are read as.
KERNEL BOUNDS(D, 1) void mean_keys(const Batch *s) {
  SHARED ALIGN16 u8 codes[kMost / kPage][D];
  u32 job = BLOCK_X, pages = (stored_of(s) + kPage - 1) / kPage, j = THREAD;
  Floats mean = (Floats)s->pageMeans + (u64)job * pages * D + j;
  Bytes out = out_of(s, job) + s->pages + mean_keys_at(pages);
  float lo = mean[0], hi = lo, from, step;
  ROLLED for (u32 p = 0; p < pages; p++) {
    float x = mean[p * D];
    lo = x < lo ? x : lo, hi = x > hi ? x : hi;
  }
  fit_bins(out + j / 16 * 64, j % 16, lo, hi, *(GLOBAL const int *)(out_of(s, job) + s->exponent), from, step);
  float inverse = 1 / step;
  ROLLED for (u32 p = 0; p < pages; p++) {
    u32 code = (u32)clipped((mean[p * D] - from) * inverse, 0, 255);
    codes[p][j] = code;
    mean[p * D] = from + ((float)(code & 0xf0) + 8) * step;
  }
  sync_block();
  out += kStepBytes;
  ROLLED for (u32 i = THREAD; i < pages * kGroups * 2; i += D) {
    u32 p = i % pages, line = i / pages, shift = 6 - 2 * (line % 2), word = 0;
    UNROLL for (u32 r = 0; r < 4; r++) word |= (*(const u32 *)&codes[p][line / 2 * 16 + 4 * r] >> shift & 0x03030303) << 2 * r;
    *(Words)(out + p / kLeaf * kMeanLeaf + line * 64 + p % kLeaf * 4) = word;
  }
}

// b: what keys differ from their page's mean by, as that is read.
KERNEL BOUNDS(D, 1) void deviate(const Batch *s) {
  u32 n = stored_of(s), job = BLOCK_Y, page = BLOCK_X, pages = (n + kPage - 1) / kPage, lo = page * kPage, hi = lo + kPage < n ? lo + kPage : n, j = THREAD;
  Floats x = slot(s->c, s, job), deltas = slot(s->b, s, job);
  float mean = ((Floats)s->pageMeans)[((u64)job * pages + page) * D + j];
  _Pragma("unroll 16") for (u32 t = lo; t < hi; t++) deltas[t * D + j] = x[t * D + j] - mean;
}

// e: the keys' deviations times the moments of queries.
KERNEL BOUNDS(kThreads, 3) void felt(const Batch *s) {
  SHARED Tiles t;
  u32 job = BLOCK_Y;
  times(slot(s->e, s, job), slot(s->b, s, job), nullptr, (Floats)s->moments + (u64)job * D * D, stored_of(s), t);
}

// The spreads of the pages' keys.
KERNEL BOUNDS(kThreads, 4) void spreads(const Batch *s) {
  SHARED float all[kPage];
  u32 n = stored_of(s), job = BLOCK_Y, page = BLOCK_X, lo = page * kPage, count = n - lo < kPage ? n - lo : kPage, i = THREAD / 4;
  u32 t = lo + (i < count ? i : 0);
  float x = quad_dot(row_of(slot(s->e, s, job) + t * D), row_of(slot(s->b, s, job) + t * D));
  if (THREAD % 4 == 0) all[i] = larger(0, x);
  sync_block();
  if (THREAD == 0) mean_spread(all, count, out_of(s, job) + s->pages + key_spreads_at((n + kPage - 1) / kPage) + 2 * page);
}

// The sums over the body of the products of deviations: keys by keys, then keys by values; of 256 tokens in float32, these in float64.
KERNEL BOUNDS(kThreads, 2) void products(const Batch *s) {
  SHARED Tiles t;
  constexpr u32 kAcross = D / kTile;
  u32 job = BLOCK_Y, which = BLOCK_X / (kAcross * kAcross), body = s->body;
  u32 row = BLOCK_X / kAcross % kAcross * kTile, column = BLOCK_X % kAcross * kTile;
  Floats keys = slot(s->b, s, job), others = which ? slot(s->f, s, job) : keys;
  double sum[4][4] = {};
  ROLLED for (u32 lo = 0; lo < body; lo += kStep) {
    float part[4][4] = {};
    u32 hi = lo + kStep < body ? lo + kStep : body;
    ROLLED for (u32 l = lo; l < hi; l += kDepth) {
      UNROLL for (u32 i = THREAD; i < kTile * kDepth; i += kThreads) {
        u32 token = l + i / kTile, c = i % kTile;
        t.a[i / kTile][c] = token < hi ? keys[token * D + row + c] : 0;
        t.b[i / kTile][c] = token < hi ? others[token * D + column + c] : 0;
      }
      sync_block();
      tile_products(part, t);
      sync_block();
    }
    UNROLL for (u32 i = 0; i < 4; i++) UNROLL for (u32 j = 0; j < 4; j++) sum[i][j] += part[i][j];
  }
  Doubles out = (Doubles)(out_of(s, job) + s->products) + which * D * D;
  u32 y = THREAD / 16, x = THREAD % 16;
  UNROLL for (u32 i = 0; i < 4; i++) UNROLL for (u32 j = 0; j < 4; j++) out[(row + 4 * y + i) * D + column + 4 * x + j] = sum[i][j];
}

// The codec's error (attention.AttendInOrder).

// e: the values as they are read without the low planes.
KERNEL BOUNDS(kThreads, 4) void unpack(const Batch *s) {
  constexpr u32 kRow = D / 2;
  u32 n = stored_of(s), job = BLOCK_Y, first = BLOCK_X * kPage, tokens = n - first < kPage ? n - first : kPage, body = s->body;
  Bytes out = out_of(s, job), at = out + s->values + first * (3 + kRow);
  Floats to = slot(s->e, s, job);
  ROLLED for (u32 i = THREAD; i < tokens * kRow; i += kThreads) {
    u32 t = i / kRow, j = i % kRow, place = first + t, code = at[3 * tokens + i];
    u32 x = code << 4 & 0xf0, y = code & 0xf0;
    float step = bits<float>((u32)(at[3 * t] | at[3 * t + 1] << 8) << 15), offset = .5f - (float)at[3 * t + 2];
    if (place >= body && place - body < kLeaf) {
      u32 low = out[s->drains + (kLines - kMain) * 64 + (place - body) * kRow + j];
      x |= low & 15, y |= low >> 4;
    } else {
      offset += 7.5f;
    }
    to[place * D + j] = ((float)x + offset) * step;
    to[place * D + j + kRow] = ((float)y + offset) * step;
  }
}

DEVICE double fused(double a, double b, double c) {
  double r;
  asm("fma.rn.f64 %0, %1, %2, %3;" : "=d"(r) : "d"(a), "d"(b), "d"(c));
  return r;
}

// Go's math.Exp on amd64, of x <= 0 or what is no number, as a float32: with fused multiply-adds where the host has them.
DEVICE float exponential(float arg, bool fma) {
  double x = arg;
  if (x != x) return arg;
  if (x < -1e4) return 0;
  double product = x * 1.4426950408889634;
  int e;
  asm("cvt.rni.s32.f64 %0, %1;" : "=r"(e) : "d"(product));
  double n = e, y;
  constexpr double upper = 0.69314718055966295651160180568695068359375, lower = 0.28235290563031577122588448175013436025525412068e-12;
  constexpr double c[8] = {2.4801587301587301587e-5, 1.9841269841269841270e-4, 1.3888888888888888889e-3, 8.3333333333333333333e-3,
                           4.1666666666666666667e-2, 1.6666666666666666667e-1, .5, 1};
  if (fma) {
    x = fused(-n, upper, x);
    x = fused(-n, lower, x) * 0.0625;
    y = c[0];
    UNROLL for (int i = 1; i < 8; i++) y = fused(y, x, c[i]);
  } else {
    x -= n * upper;
    x -= n * lower;
    x *= 0.0625;
    y = c[0];
    UNROLL for (int i = 1; i < 8; i++) y = y * x + c[i];
  }
  x *= y;
  UNROLL for (int i = 0; i < 3; i++) x *= x + 2;
  y = x + 2;
  x = fma ? fused(y, x, 1) : x * y + 1;
  // A float32 is 0 long before a float64 is small.
  return e < -1022 ? 0 : (float)(x * power_of_two(e));
}

// A query's attention to the rows (which 0) or to what is read of them (1): the sum of weights, then that of weighted values.
KERNEL BOUNDS(kThreads, 4) void attend_rows(const Batch *s, u32 fma) {
  SHARED float scores[kMost];
  SHARED ALIGN16 float q[D];
  SHARED float most[kThreads / kWarp];
  u32 n = stored_of(s), job = BLOCK_Y, row = BLOCK_X / 2, which = BLOCK_X % 2, queries = s->queryRows;
  Floats k = slot(which ? s->b : s->c, s, job), v = slot(which ? s->e : s->a, s, job);
  Doubles out = (Doubles)(out_of(s, job) + s->partials + (u64)BLOCK_X * (8 + 4 * D));
  if (THREAD < D) q[THREAD] = ((Floats)s->queries)[((u64)job * queries + row) * D + THREAD];
  sync_block();
  float hi = -__builtin_inff();
  ROLLED for (u32 base = 0; base < n; base += kThreads / 4) {
    u32 i = base + THREAD / 4;
    float dot = quad_dot(row_of(k + (i < n ? i : n - 1) * D), row_of(q));
    hi = larger(hi, dot);
    if (i < n && THREAD % 4 == 0) scores[i] = dot;
  }
  UNROLL for (u32 h = 1; h < kWarp; h *= 2) hi = larger(hi, shuffle_xor(hi, h));
  if (THREAD % kWarp == 0) most[THREAD / kWarp] = hi;
  sync_block();
  hi = -__builtin_inff();
  UNROLL for (u32 i = 0; i < kThreads / kWarp; i++) hi = larger(hi, most[i]);
  bool none = !(hi > -__builtin_inff()); // all is masked, or a score is no number
  ROLLED for (u32 i = THREAD; i < n; i += kThreads) scores[i] = none ? 0 : exponential(scores[i] - hi, fma);
  sync_block();
  if (THREAD < D) {
    float sum = 0;
    _Pragma("unroll 8") for (u32 i = 0; i < n; i++) {
      float w = scores[i], x = v[i * D + THREAD];
      if (w > 0) sum += w * x;
    }
    ((Floats)(out + 1))[THREAD] = sum;
  }
  if (THREAD == kThreads - 1) {
    double sum = 0;
    _Pragma("unroll 16") for (u32 i = 0; i < n; i++) {
      float w = scores[i];
      if (w > 0) sum += w;
    }
    *out = sum;
  }
}
