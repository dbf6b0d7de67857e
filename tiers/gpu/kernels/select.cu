// Which pages a query reads, where they lie: scan scores the first plane of keys of every page, choose takes those that weigh most and lists
// them for gather (gather.cu), rest lets what is not read stand by its mass and its page's mean value.
//
// Candidates are units (segments.h) of whole pages of a body. Page p of candidate c has number 4 c + p in the tables below, [pages][rows].
#include "segments.h"

constexpr u32 kMostRows = 32;             // query rows of a head that choose together
constexpr u32 kThreads = 512;             // of choose
constexpr u32 kGrades = 256, kDigits = 2; // of ranks
constexpr float kMostRaise = 1, kMostNoise = 1e4f;
constexpr float kBelow = 6; // how far below the least page that is chosen a token's value is still read, log2: where it weighs what such a page's tokens do

// What 2 bits, and more, leave unknown of a key, in squares of the range of its bins (compress.KeyNoise).
DEVICE float noise_of(u32 level) { return level == 0 ? 1 / 45.f : level == 1 ? .14f / 31 : 1 / 12.f * bits<float>((127 - 4 * level) << 23); }

// Choice is what a head chooses from, and where that goes: numbers of entries.
struct Choice {
  u32 first, end;          // candidates
  u32 pages;               // of them
  u32 scans, scans_end;    // splits of scan
  u32 units;               // where what is attended is listed
  u32 splits, splits_end;  // of that
};

// First is what the first plane holds of a head's keys: lines, each 2 bits of a group of 16 channels; a group may have several.
template <u32 D> struct First {
  static constexpr u32 lines = (D / 16 + 3) / 4;
  u32 group[lines], level[lines];

  METHOD First(const u8 *order) {
    UNROLL for (u32 i = 0; i < lines; i++) {
      group[i] = order[i] % (D / 16), level[i] = 0;
      UNROLL for (u32 j = 0; j < i; j++) level[i] += group[j] == group[i];
    }
  }

  // of returns how many lines a group has.
  METHOD u32 of(u32 g) const {
    u32 n = 0;
    UNROLL for (u32 i = 0; i < lines; i++) n += group[i] == g;
    return n;
  }
};

constexpr u32 kRaised = 16;

// A warp's part of shared memory: a candidate's keys, bins and channels' order, and mean keys: code n, of 16, as 2n - 15, raised by kRaised.
template <u32 D> struct Staged {
  static constexpr u32 lines = First<D>::lines;
  static constexpr u32 leaf = lines * kLine;
  static constexpr u32 bins_at = kBins / kLeaf * leaf, order_at = bins_at + 4 * D, means_at = bins_at + 5 * D;
  static constexpr u32 mean = D + 16;  // so far apart that equal channels of different pages are in different banks
  static constexpr u32 size = means_at + kPages * mean;
};

// stage brings a candidate to shared memory. In its mean keys, channels of which the first plane knows something are 0.
template <u32 D> DEVICE void stage(u32 to, const Segment &s, const Unit &u, const First<D> &first, u32 lane) {
  using S = Staged<D>;
  u32 pages = u.leaves / (kPage / kLeaf);
  const u8 *keys = s.k1 + u.leaf * S::leaf, *bins = s.steps + kOrder<D> + (u64)(u.leaf / (kBins / kLeaf)) * 4 * D;
  for (u32 i = lane; i < u.leaves * S::leaf / 16; i += kWarp) copy16(to + 16 * i, keys + 16 * i, true);
  for (u32 i = lane; i < 5 * D / 16; i += kWarp) copy16(to + S::bins_at + 16 * i, i < 4 * D / 16 ? bins + 16 * i : s.steps + 16 * i - 4 * D, true);
  copies_end_group();
  const Means<D> means(s.pages, s.stored);
  for (u32 i = lane; i < pages * D / 16; i += kWarp) {
    u32 p = i / (D / 16), g = i % (D / 16), page = u.leaf / (kPage / kLeaf) + p;
    const u8 *from = means.keys + page / kLeaf * Means<D>::leaf + 2 * g * kLine + page % kLeaf * 4;
    u32 upper = *(const u32 *)from, lower = *(const u32 *)(from + kLine);
    u32x4 codes;
    UNROLL for (u32 r = 0; r < 4; r++) codes[r] = (upper >> 2 * r & 0x03030303) * 8 + (lower >> 2 * r & 0x03030303) * 2 + 0x01010101 * (kRaised - 15);
    store_shared4(to + S::means_at + p * S::mean + 16 * g, codes);
  }
  wait_copies<0>();
  sync_warp();
  UNROLL for (u32 i = 0; i < S::lines; i++) {
    if (first.level[i] > 0) continue;
    u32 channel = load_byte(to + S::order_at + 16 * first.group[i] + lane % 16) % D;
    for (u32 p = lane / 16; p < pages; p += 2) store_byte(to + S::means_at + p * S::mean + channel, kRaised);
  }
  sync_warp();
}

// Whole is a lane's part of the query in the bins of a segment's mean keys, in words: of row lane / 4, channels 4t to 4t + 3 of every 16.
template <u32 D> struct Whole {
  u32x2 words[D / 16];  // upper bytes, lower bytes
  float unit, offset;   // what words are units of; what channels of which the first plane knows nothing score in the middle of their codes
  u32 sum;  // of the row's words, kRaised times: what codes add that are raised by that

  METHOD Whole() {}

  // The stage is that of any of the segment's candidates.
  METHOD Whole(const Segment &s, const First<D> &first, u32 stage, u32 q, u32 lane) {
    using S = Staged<D>;
    u32 t = lane % 4, row = q + lane / 4 * kPitch<D> * 4;
    const u8 *bins = Means<D>(s.pages, s.stored).bins;
    float unit2 = bits<float>((u32)(s.exponent + 127) << 23), most = 0;
    offset = 0;
    auto each = [&](u32 g, auto use) {
      u32x4 x = load_shared4(row + 64 * g + 16 * t);
      u32x2 lo = *(const u32x2 *)(bins + kLine * g + 8 * t), size = *(const u32x2 *)(bins + kLine * g + 32 + 8 * t);
      UNROLL for (u32 b = 0; b < 4; b++) {
        float y = mul(bits<float>(x[b]), unit2);
        use(b, y, widen_half((b < 2 ? lo.x : lo.y) >> 16 * (b & 1) & 0xffff), widen_half((b < 2 ? size.x : size.y) >> 16 * (b & 1) & 0xffff));
      }
    };
    ROLLED for (u32 g = 0; g < D / 16; g++)
      each(g, [&](u32, float y, float low, float size) {
        most = __builtin_fmaxf(most, __builtin_fabsf(mul(y, 8 * size)));
        offset += y * (low + 128 * size);
      });
    const WordUnit of(quad_max(most));
    unit = of.unit, sum = 0;
    UNROLL for (u32 g = 0; g < D / 16; g++) {
      u32 w[4];
      each(g, [&](u32 b, float y, float, float size) { w[b] = bits_of(add(mul(mul(y, 8 * size), of.inverse), kRounder)), sum += w[b] - bits_of(kRounder); });
      words[g] = signed_bytes(w);
    }
    sum += shuffle_xor(sum, 1), sum += shuffle_xor(sum, 2);
    sum *= kRaised;
    UNROLL for (u32 i = 0; i < S::lines; i++) {
      if (first.level[i] > 0) continue;
      u32 channels = load_shared1(stage + S::order_at + 16 * first.group[i] + 4 * t);
      UNROLL for (u32 b = 0; b < 4; b++) {
        u32 c = pick_bytes(channels, 0, 0x4440 | b) % D;
        const u8 *bin = bins + c / 16 * kLine + c % 16 * 2;
        offset -= mul(bits<float>(load_shared1(row + 4 * c)), unit2) * (widen_half(*(const u16 *)bin) + 128 * widen_half(*(const u16 *)(bin + 32)));
      }
    }
    offset = quad_sum(offset);
  }

  // products multiplies by the codes of a stage's mean keys: of row lane / 4, pages 2t and 2t + 1 in lanes of t 0 and 1.
  METHOD void products(int (&x)[2], u32 stage, u32 pages, u32 lane) const {
    using S = Staged<D>;
    u32 page = lane / 4 < pages ? lane / 4 : 0, at = stage + S::means_at + page * S::mean + lane % 4 * 4;
    int c[4] = {};
    UNROLL for (u32 g = 0; g < D / 16; g += 2)
      multiply(c, words[g].x, words[g].y, words[g + 1].x, words[g + 1].y, load_shared1(at + 16 * g), load_shared1(at + 16 * g + 16));
    UNROLL for (u32 e = 0; e < 2; e++) x[e] = (int)((u32)c[e] * 256 + (u32)c[2 + e] - sum);
  }
};

// Partly is a lane's part of the query, folded with the bins of a candidate as far as the first plane knows keys (attend.cu, fold): the words are the host's
// to the last bit.
template <u32 D> struct Partly {
  static constexpr u32 lines = First<D>::lines;
  u32x2 words[lines];
  float scale, offset;  // of the row's scores
  float noise;          // the variance of what scores lack

  METHOD Partly(const First<D> &first, u32 stage, int exponent, u32 q, u32 lane) {
    using S = Staged<D>;
    u32 t = lane % 4, row = q + lane / 4 * kPitch<D> * 4;
    float unit2 = bits<float>((u32)(exponent + 127) << 23);
    float most = 0, coarse = 0, missing = 0, product[lines][4];
    offset = 0;
    auto query = [&](u32 channels, u32 b) { return mul(bits<float>(load_shared1(row + 4 * pick_bytes(channels, 0, 0x4440 | b))), unit2); };
    ROLLED for (u32 g = 0; g < D / 16; g++) {
      if (first.of(g) > 0) continue;
      u32 channels = load_shared1(stage + S::order_at + 16 * g + 4 * t);
      u32x2 step = load_shared2(stage + S::bins_at + kLine * g + kLine / 2 + 8 * t);
      UNROLL for (u32 b = 0; b < 4; b++) {
        float x = query(channels, b) * widen_half((b < 2 ? step.x : step.y) >> 16 * (b & 1) & 0xffff);
        missing += x * x;
      }
    }
    UNROLL for (u32 i = 0; i < lines; i++) {
      u32 group = first.group[i], channels = load_shared1(stage + S::order_at + 16 * group + 4 * t), level = first.of(group), bin = stage + S::bins_at + kLine * group + 8 * t;
      u32x2 lo = load_shared2(bin), step = load_shared2(bin + kLine / 2);
      float half = bits<float>((134 - 2 * level) << 23), at = level == 1 ? 128 + (half - 128) * kShrink : half, squares = 0;
      UNROLL for (u32 b = 0; b < 4; b++) {
        float x = query(channels, b);
        float low = widen_half((b < 2 ? lo.x : lo.y) >> 16 * (b & 1) & 0xffff), size = widen_half((b < 2 ? step.x : step.y) >> 16 * (b & 1) & 0xffff);
        float wide = mul(x, size);
        product[i][b] = mul(wide, level == 1 ? kShrink : 1);
        most = __builtin_fmaxf(most, __builtin_fabsf(product[i][b]));
        if (first.level[i] > 0) continue;
        offset += x * (low + size * at), squares += wide * wide;
      }
      coarse += squares * noise_of(level);
    }
    const WordUnit of(quad_max(most));
    UNROLL for (u32 i = 0; i < lines; i++) {
      float middle = 128 - bits<float>((134 - 2 * first.of(first.group[i])) << 23);
      u32 w[4];
      UNROLL for (u32 b = 0; b < 4; b++) {
        float word = add(mul(product[i][b], of.inverse), kRounder);
        w[b] = bits_of(word);
        if (first.level[i] == 0) offset += (product[i][b] - mul(word - kRounder, of.unit)) * middle;
      }
      words[i] = signed_bytes(w);
    }
    scale = of.unit, offset = quad_sum(offset);
    constexpr float range2 = 65536;  // of 256 bins
    noise = __builtin_fminf(quad_sum(coarse) * range2, kMostNoise) + __builtin_fminf(quad_sum(missing) * noise_of(0) * range2, kMostNoise);
  }
};

// sums multiplies words by the codes of a step of 32 tokens, whose keys begin at keys: as products in attend.cu.
template <u32 D> DEVICE void sums(int (&c)[4][4], const First<D> &first, const Partly<D> &q, u32 keys, u32 lane) {
  constexpr u32 lines = First<D>::lines;
  u32 g = lane / 4, turn = 2 * (lane % 4) + 26;
  UNROLL for (u32 i = 0; i < lines; i += 2) {
    u32 codes[2][4] = {};
    UNROLL for (u32 h = 0; h < 2 && i + h < lines; h++) {
      u32x4 w = load_shared4(keys + (g / 4 * lines + i + h) * kLine + g % 4 * 16);
      u32 by = 2 * first.level[i + h];
      UNROLL for (u32 j = 0; j < 4; j++) codes[h][j] = rotate_right(w[j], turn + by) & kFirst >> by;
    }
    u32x2 none = {}, next = i + 1 < lines ? q.words[(i + 1) % lines] : none;
    UNROLL for (u32 j = 0; j < 4; j++) multiply(c[j], q.words[i].x, q.words[i].y, next.x, next.y, codes[0][j], codes[1][j]);
  }
}

#ifndef PARTS

// scan writes of each page and row the log2 of its mass, and what rules it, and of each split and row the largest mass and the sum of them in
// units of that, totals [splits][rows][2]. q is [heads][rows][D], scaled. A block of 4 warps has 4 splits of one head.
KERNEL void BOUNDS(128, SCAN_BLOCKS)
    scan(const Segment *segments, const Unit *candidates, const Split *splits, const float *queries, float *masses, Rule *rules, float *totals, u64 rows64, u64 softcap64) {
  constexpr u32 D = HEAD_DIM;
  using S = Staged<D>;
  SHARED static __attribute__((aligned(128))) u8 memory[kRows * kPitch<D> * 4 + 4 * S::size];
  u32 lane = THREAD % kWarp, warp = THREAD / kWarp, all = (u32)rows64, row = BLOCK_Y * kRows, rows = all - row < kRows ? all - row : kRows;
  float softcap = bits<float>((u32)softcap64);
  const Split split = splits[BLOCK_X * 4 + warp];
  take_rows<D>(queries + ((u64)split.head * all + row) * D, rows, (float *)memory);
  u32 at = shared_address(memory), room = at + kRows * kPitch<D> * 4 + warp * S::size, g = lane / 4;
  float most = kLowest, sum = 0;
  u32 last = ~0u;
  Whole<D> whole;
  for (u32 i = split.first; i < split.end; i++) {
    const Unit u = candidates[i];
    const Segment &s = segments[u.segment];
    const First<D> first(s.steps + D);
    u32 pages = u.leaves / (kPage / kLeaf);
    stage<D>(room, s, u, first, lane);
    if (u.segment != last) last = u.segment, whole = Whole<D>(s, first, room, at, lane);
    int means[2];
    whole.products(means, room, pages, lane);
    const Partly<D> part(first, room, s.exponent, at, lane);
    float log2 = softcap != 0 ? 1 : kLog2e, raise = __builtin_fminf(part.noise / 2, kMostRaise) * kLog2e;
    float scatter = __builtin_fminf(exp2(__builtin_fminf(part.noise, 1) * kLog2e) - 1, 1);
    ROLLED for (u32 p = 0; p < pages; p++) {
      float mean = (float)(int)shuffle((u32)(p & 1 ? means[1] : means[0]), (lane & ~3u) + p / 2) * whole.unit + whole.offset;
      float offset = (part.offset + mean) * log2, top = kLowest, x[kPage / kStep][4][2];
      UNROLL for (u32 k = 0; k < kPage / kStep; k++) {
        int c[4][4] = {};
        sums<D>(c, first, part, room + (p * (kPage / kLeaf) + k * (kStep / kLeaf)) * S::leaf, lane);
        UNROLL for (u32 j = 0; j < 4; j++)
          UNROLL for (u32 e = 0; e < 2; e++) {
            float score = (float)(c[j][e] * 256 + c[j][2 + e]) * (part.scale * log2) + offset;
            x[k][j][e] = softcap != 0 ? cap(score, softcap) : score;
            top = __builtin_fmaxf(top, x[k][j][e]);
          }
      }
      top = quad_max(top);
      float weights = 0, squares = 0;
      UNROLL for (u32 k = 0; k < kPage / kStep; k++)
        UNROLL for (u32 j = 0; j < 4; j++)
          UNROLL for (u32 e = 0; e < 2; e++) {
            float w = exp2(x[k][j][e] - top);
            weights += w, squares += w * w;
          }
      weights = quad_sum(weights), squares = quad_sum(squares);
      float mass = top + ::log2(weights) + raise;
      if (lane % 4 == 0 && g < rows) {
        u64 n = (u64)(i * kPages + p) * all + row + g;
        float rule = squares * reciprocal(weights * weights);
        masses[n] = mass, rules[n] = {rule * (1 + scatter), rule * scatter};
      }
      float over = __builtin_fmaxf(most, mass);
      sum = sum * exp2(most - over) + exp2(mass - over), most = over;
    }
    sync_warp();
  }
  if (lane % 4 == 0 && g < rows) {
    float *to = totals + ((u64)(BLOCK_X * 4 + warp) * all + row + g) * 2;
    to[0] = most, to[1] = sum;
  }
}

// before returns the sum of x over the threads before this one, and the sum over all, of a block of kThreads. warps is this use's own: nobody may still
// read what the use before wrote there.
DEVICE u32 before(u32 x, u32 *warps, u32 lane, u32 warp, u32 &all) {
  auto up_to = [&](u32 x) {
    UNROLL for (u32 by = 1; by < kWarp; by *= 2) {
      u32 y = shuffle(x, lane - by);
      if (lane >= by) x += y;
    }
    return x;
  };
  u32 own = up_to(x);
  if (lane == kWarp - 1) warps[warp] = own;
  sync_block();
  u32 sums = up_to(lane < kThreads / kWarp ? warps[lane] : 0);
  all = shuffle(sums, kWarp - 1);
  u32 below = shuffle(sums, warp - 1);
  return own - x + (warp > 0 ? below : 0);
}

// grade_of finds in how many pages have each grade that in which the n-th largest is, and takes those above off n.
DEVICE u32 grade_of(const u32 *counts, u32 &n, u32 lane) {
  u32 own = 0, above = 0;
  UNROLL for (u32 i = 0; i < kGrades / kWarp; i++) own += counts[lane * (kGrades / kWarp) + i];
  above = own;
  UNROLL for (u32 by = 1; by < kWarp; by *= 2) {
    u32 y = shuffle(above, lane + by);
    if (lane + by < kWarp) above += y;
  }
  above -= own;
  u32 has = ballot(above < n && n <= above + own), of = has == 0 ? 0 : __builtin_ctz(has), grade = of * (kGrades / kWarp) + kGrades / kWarp - 1;
  n -= shuffle(above, of);
  ROLLED for (; grade > of * (kGrades / kWarp) && counts[grade] < n; grade--) n -= counts[grade];
  return grade;
}

// choose lists what is read of a head, a block for each: of the candidates' pages that share of 2^16, rounded up, that
// weigh most in any row, the first ones where they weigh the same. A page's rank is the log of its share of what a row's candidates weigh, in 256ths of a bit.
// ranks [candidates] are for this kernel alone; chosen [candidates] gets a bit for each page, numbers the number of each unit's first page, tops [heads][rows]
// the largest masses, cuts [heads][rows] the least score of tokens whose values are to be read: where all pages are chosen, any.
KERNEL void BOUNDS(kThreads, 1)
    choose(const Choice *choices, const Unit *candidates, const float *masses, const float *totals, u64 *ranks, u32 *chosen, Unit *units, u32 *numbers,
           Split *splits, float *tops, float *cuts, u64 rows64, u64 share) {
  SHARED static float total[kMostRows];
  SHARED static u32 counts[kDigits][kGrades], sums[2][kThreads / kWarp];
  u32 lane = THREAD % kWarp, warp = THREAD / kWarp, rows = (u32)rows64;
  const Choice c = choices[BLOCK_X];
  for (u32 i = THREAD; i < kDigits * kGrades; i += kThreads) counts[i / kGrades][i % kGrades] = 0;
  for (u32 r = warp; r < rows; r += kThreads / kWarp) {
    float most = kLowest, sum = 0;
    for (u32 i = c.scans + lane; i < c.scans_end; i += kWarp) {
      const float *x = totals + ((u64)i * rows + r) * 2;
      float over = __builtin_fmaxf(most, x[0]);
      sum = sum * exp2(most - over) + x[1] * exp2(x[0] - over), most = over;
    }
    float top = most;
    UNROLL for (u32 x = 1; x < kWarp; x *= 2) top = __builtin_fmaxf(top, shuffle_xor(top, x));
    sum *= exp2(most - top);
    UNROLL for (u32 x = 1; x < kWarp; x *= 2) sum += shuffle_xor(sum, x);
    if (lane == 0) total[r] = top + log2(sum), tops[BLOCK_X * rows + r] = top;
  }
  sync_block();
  for (u32 i = c.first + THREAD; i < c.end; i += kThreads) {
    u32 pages = candidates[i].leaves / (kPage / kLeaf);
    u64 all = 0;
    for (u32 p = 0; p < pages; p++) {
      const float *mass = masses + (u64)(i * kPages + p) * rows;
      float least = 3e38f;  // that is missing to all of a row's
      for (u32 r = 0; r < rows; r++) least = __builtin_fminf(least, total[r] - mass[r]);
      u32 rank = 0xffff - (u32)__builtin_fminf(__builtin_fmaxf(least * 256, 0), 0xffff);
      add_shared(&counts[0][rank / kGrades], 1);
      all |= (u64)rank << 16 * p;
    }
    ranks[i] = all;
  }
  sync_block();
  u32 n = (u32)(((u64)c.pages * share + 0xffff) >> 16);
  bool every = n == c.pages;
  u32 upper = grade_of(counts[0], n, lane);
  for (u32 i = c.first + THREAD; i < c.end; i += kThreads) {
    u32 pages = candidates[i].leaves / (kPage / kLeaf);
    for (u32 p = 0; p < pages; p++) {
      u32 rank = (u32)(ranks[i] >> 16 * p) & 0xffff;
      if (rank / kGrades == upper) add_shared(&counts[1][rank % kGrades], 1);
    }
  }
  sync_block();
  u32 least = upper * kGrades + grade_of(counts[1], n, lane);  // n of these are taken
  for (u32 r = THREAD; r < rows; r += kThreads) cuts[BLOCK_X * rows + r] = every ? kLowest : total[r] - (float)(0xffff - least) / 256 - kBelow;
  u32 listed = 0, equal = 0;
  for (u32 begin = c.first; begin < c.end; begin += kThreads) {
    u32 i = begin + THREAD, taken = 0, same = 0, added;
    Unit u = {};
    if (i < c.end) {
      u = candidates[i];
      for (u32 p = 0; p < u.leaves / (kPage / kLeaf); p++) {
        u32 rank = (u32)(ranks[i] >> 16 * p) & 0xffff;
        taken |= (rank > least) << p, same |= (rank == least) << p;
      }
    }
    u32 ahead = equal + before(count_ones(same), sums[0], lane, warp, added);
    equal += added;
    for (; same != 0 && ahead < n; ahead++) taken |= same & -same, same &= same - 1;
    u32 to = c.units + listed + before(count_ones(taken & ~(taken << 1)), sums[1], lane, warp, added);  // runs of pages
    listed += added;
    if (i < c.end) chosen[i] = taken;
    while (taken != 0) {
      u32 p = __builtin_ctz(taken), run = __builtin_ctz(~(taken >> p));
      numbers[to] = i * kPages + p;
      units[to++] = {u.segment, (u16)(u.leaf + p * (kPage / kLeaf)), (u8)(run * (kPage / kLeaf)), 0};
      taken &= taken + (1u << p);
    }
  }
  u32 warps = c.splits_end - c.splits;
  for (u32 i = THREAD; i < warps; i += kThreads)
    splits[c.splits + i] = {BLOCK_X, c.units + (u32)((u64)i * listed / warps), c.units + (u32)((u64)(i + 1) * listed / warps)};
}

// rest makes partials of the tokens of candidates that were not read, rotated, ml [splits][rows][2] and out [splits][rows][D], and of each row the sums of squares of
// what they may err by: of their weights times the spread of values, and of those weights as far as keys are not known, all in units of tops; and their number;
// errors [splits][rows][3]. read [pages][blocks of rows] has a bit for each token of a chosen page, set if it was read.
KERNEL void BOUNDS(128, 4) rest(const Segment *segments, const Unit *candidates, const Split *splits, const u32 *chosen, const u64 *read, const float *masses,
                                const Rule *rules, const float *tops, float *ml, float *out, float *errors, u64 rows64) {
  constexpr u32 D = HEAD_DIM, kOwn = D / kWarp;  // channels of a lane
  u32 lane = THREAD % kWarp, index = BLOCK_X * 4 + THREAD / kWarp, all = (u32)rows64, row = BLOCK_Y * kRows, rows = all - row < kRows ? all - row : kRows;
  const Split split = splits[index];
  bool own = lane < rows;  // this lane knows a row's masses
  float top = own ? tops[split.head * all + row + lane] : 0, weights = 0, spreads = 0, noises = 0, tokens = 0, values[kRows][kOwn] = {};
  for (u32 i = split.first; i < split.end; i++) {
    const Unit u = candidates[i];
    const Segment &s = segments[u.segment];
    u32 taken = chosen[i];
    const Means<D> means(s.pages, s.stored);
    for (u32 p = 0; p < u.leaves / (kPage / kLeaf); p++) {
      if (taken >> p & 1) {
        u64 known = read[(u64)(i * kPages + p) * BLOCKS_Y + BLOCK_Y];
        if (known == ~0ull) continue;
        tokens -= (float)__builtin_popcountll(known);
      }
      tokens += kPage;
      u32 page = u.leaf / (kPage / kLeaf) + p, both = *(const u32 *)(means.scales + 4 * page);
      float weight = 0;
      if (own) {
        u64 n = (u64)(i * kPages + p) * all + row + lane;
        weight = exp2(masses[n] - top), weights += weight;
        const Rule rule = rules[n];
        float spread = bits<float>(both & 0xffff0000), square = weight * weight;
        spreads += square * rule.all * spread, noises += square * rule.noise;
      }
      weight *= bits<float>(both << 16);
      const u8 *from = means.values + page * D + lane * kOwn;
      float x[kOwn];
      if constexpr (kOwn == 2) {
        u32 w = *(const u16 *)from;
        x[0] = (float)(signed char)w, x[1] = (float)(signed char)(w >> 8);
      } else {
        UNROLL for (u32 k = 0; k < kOwn; k += 4) {
          u32 w = *(const u32 *)(from + k);
          UNROLL for (u32 b = 0; b < 4; b++) x[(k + b) % kOwn] = (float)(signed char)(w >> 8 * b);
        }
      }
      UNROLL for (u32 r = 0; r < kRows; r++) {
        if (r == kRows / 2 && rows <= kRows / 2) break;
        float by = shuffle(weight, r);
        UNROLL for (u32 k = 0; k < kOwn; k++) values[r][k] += by * x[k];
      }
    }
  }
  u64 at = (u64)index * all + row;
  if (own) ml[2 * (at + lane)] = top, ml[2 * (at + lane) + 1] = weights, errors[3 * (at + lane)] = spreads, errors[3 * (at + lane) + 1] = noises, errors[3 * (at + lane) + 2] = tokens;
  UNROLL for (u32 r = 0; r < kRows; r++)
    if (r < rows) {
      UNROLL for (u32 k = 0; k < kOwn; k++) out[(at + r) * D + lane * kOwn + k] = values[r][k];
    }
}

#endif
