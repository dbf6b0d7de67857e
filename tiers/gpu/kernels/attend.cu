// Attention to all stored codes of sealed segments, where they lie: scores in integers, softmax, values, in one pass.
//
// A warp works alone. It attends a split, a run of units of one KV head, for up to 8 query rows, and leaves a partial.
// A unit is up to 256 tokens that share the bins of their keys; it goes 32 tokens (two leaves) a step. A step's bytes come to shared memory
// by asynchronous copies while the step before is computed; lines of keys are put there by what they are, so that
// the loops below know where most of them lie, and read ahead.
//
// Keys. A line's 32-bit word of a token has, in bits 2t and 2t + 1 of its four bytes, 2 bits of channels 4t to 4t + 3: just what
// lane t of a quad contributes to a fragment of the matrix units. The folded query's 16-bit words (attention/kernels, Fold) go in
// as two signed bytes: rows 0 to 7 of the other factor are the upper ones, rows 8 to 15 the lower ones. So integers are exact, and a lane gets both
// parts of a score. Column g of tile i is token 4g + i of the step: one load brings a lane the words of all four tiles.
//
// Values. The weights, as the scores' lanes have them, are the fragment that the matrix units want next: no lane hands anything to another. Values'
// codes are binary16 as they are, subnormal numbers of units of 2^-24: a mask is all that they need.
#include "segments.h"

// Whether lanes without a row fold groups of others': where it is faster, and there are registers for it.
template <u32 D, bool kLow> constexpr bool kShares = D == 128 && !kLow;

// What a step has in shared memory. Values can be left out of it (gather.cu).
template <u32 D, bool kLow, bool kValues = true> struct Shape {
  static constexpr u32 groups = D / 16;
  static constexpr u32 f = (groups + 3) / 4;
  static constexpr u32 k3 = groups > 2 * f + 1 ? groups - 2 * f : 1, k4 = 2 * groups - k3;
  // Lines of a plane, and in the planes before it.
  METHOD static constexpr u32 plane_lines(u32 plane) { return plane < 2 ? f : plane == 2 ? k3 : plane == 3 ? k4 : 2 * (groups - f); }
  METHOD static constexpr u32 before(u32 plane) {
    return plane == 0 ? 0 : plane == 1 ? f : plane == 2 ? 2 * f : plane == 3 ? 2 * f + k3 : 2 * f + k3 + k4;
  }
  METHOD static constexpr u32 plane_of(u32 line) {
    return line < before(1) ? 0 : line < before(2) ? 1 : line < before(3) ? 2 : line < before(4) ? 3 : 4;
  }
  static constexpr u32 lines = kLow ? 4 * groups : 2 * groups + 2 * f;
  static constexpr u32 behind = 2 * f;    // lines behind each group's first two
  static constexpr u32 row = D / 2;  // bytes of a value's high codes
  static constexpr u32 keys = lines * 2 * kLine;
  static constexpr u32 values = kStep * row;
  static constexpr u32 scales = kStep * kScale;  // 96
  static constexpr u32 high_at = keys, low_at = keys + values, scales_at = keys + (kValues ? values * (kLow ? 2 : 1) : 0);
  static constexpr u32 align = D == 256 ? 16 : 128;  // a block of dimension 256 just fits what an A100 has
  static constexpr u32 bins_at = (scales_at + scales + align - 1) / align * align;
  static constexpr u32 bins = 5 * D;  // by group of channels lower ends and sizes, then the channels' order
  static constexpr u32 stage = bins_at + (bins + align - 1) / align * align;
  // A warp copies a step's keys in rounds of 4 lines, 16 bytes a lane.
  static constexpr u32 rounds = (lines + 3) / 4;
  METHOD static constexpr u32 first_plane(u32 round) { return plane_of(4 * round); }
  METHOD static constexpr u32 last_plane(u32 round) { return plane_of(4 * round + 3 < lines ? 4 * round + 3 : lines - 1); }
  METHOD static constexpr bool one_plane(u32 round) { return first_plane(round) == last_plane(round); }
  // A round that goes on in the plane of the one before needs no address of its own.
  METHOD static constexpr bool goes_on(u32 round) {
    return round > 0 && one_plane(round) && one_plane(round - 1) && first_plane(round) == first_plane(round - 1);
  }
  METHOD static constexpr u32 source(u32 round) { return round == 0 ? 0 : source(round - 1) + (goes_on(round) ? 0 : 1); }
  METHOD static constexpr u32 past(u32 round) { return goes_on(round) ? past(round - 1) + 4 * kLine : 0; }
  METHOD static constexpr bool one_stride(u32 round) { return plane_lines(first_plane(round)) == plane_lines(last_plane(round)); }
  static constexpr u32 sources = source(rounds - 1) + 1;
  static constexpr u32 word = D / 16;                     // bytes of a value's codes that a lane reads: 16 channels a quad
  static constexpr u32 value_rounds = values / 16 / 32;   // 1, 2 or 4 a warp
};

// swap says by which amount rows of values change places in shared memory, so that lanes' reads fall to different banks.
template <u32 D> DEVICE u32 placed_row(u32 r) { return D == 64 ? r ^ (r >> 3 & 3) : D == 128 ? r ^ (r >> 3 & 1) : r; }

// Lines says what each line of keys is, and where it goes in shared memory. First come the lines that know most of each group, by group, then their second
// ones; where all bits are known, the third and the fourth. Else what is left, the others, come behind, and in the places of missing second ones.
// Lane i knows it of lines i and i + 32.
template <u32 D, bool kLow> struct Lines {
  using S = Shape<D, kLow>;
  static constexpr u32 words = (S::lines + 31) / 32;
  u32 group[words], level[words], place[words];
  u32 other[words];      // of the others: the how manieth it is
  u32 others;            // how many there are
  u32 ones, twos;        // of the number of lines that a group has behind its first, its two bits, a bit of each here for each group

  METHOD Lines(const u8 *lines, u32 lane) {
    u32 count = 0;  // of the lines of group lane
    UNROLL for (u32 j = 0; j < words; j++) group[j] = 32 * j + lane < S::lines ? lines[32 * j + lane] % S::groups : ~0u, level[j] = 0;
    UNROLL for (u32 i = 0; i < S::lines; i++) {
      u32 x = shuffle(group[i / 32], i % 32);
      count += x == lane;
      UNROLL for (u32 j = 0; j < words; j++) level[j] += x == group[j] && i < 32 * j + lane;
    }
    ones = ballot(lane < S::groups && (count - 1) & 1), twos = ballot(lane < S::groups && (count - 1) & 2);
    others = 0;
    UNROLL for (u32 j = 0; j < words; j++) {
      place[j] = level[j] * S::groups + group[j];
      if (!kLow) {
        u32 rest = ballot(level[j] >= 2);
        other[j] = others + count_ones(rest & ((1u << lane) - 1)), others += count_ones(rest);
        if (level[j] >= 2) place[j] = other[j] < S::behind ? 2 * S::groups + other[j] : S::groups + nth_one(~(ones | twos), other[j] - S::behind);
      }
      if (place[j] >= S::lines) place[j] = S::lines - 1;  // of a plane that no sealer wrote
    }
  }

  // of returns the place of a line, which is any of word, in units of a step's lines.
  template <u32 word> METHOD u32 of(u32 line) const { return shuffle(place[word], line % 32); }
};

// Stager copies steps to shared memory, one after the other; without values, of whole pages only.
template <u32 D, bool kLow, bool kValues = true> struct Stager {
  using S = Shape<D, kLow, kValues>;
  const Segment *segments;
  const Unit *units;
  u32 lane;
  u32 unit, end;                // of the split
  u32 segment;                  // that the registers below are of
  u32 leaf, left;               // the next leaf, and how many are left of the unit
  bool begins;                  // the next step is a unit's first
  const u8 *from[S::sources];   // this lane's part of the leaf
  u32 stride[S::sources];       // bytes a leaf
  u32 to[(S::rounds + 1) / 2];  // in a stage, in units of 16 bytes; two a word
  const u8 *high, *low;
  u32 stored, low_leaf;

  METHOD void begin(const Segment *s, const Unit *u, u32 first, u32 last) {
    segments = s, units = u, unit = first, end = last, segment = ~0u, leaf = 0, left = 0;
    lane = THREAD % kWarp;
    next_unit();
  }

  METHOD bool done() const { return unit == end; }

  METHOD void next_unit() {
    if (done()) return;
    const Unit u = units[unit];
    bool goes_on = u.segment == segment && u.leaf == leaf;
    segment = u.segment, leaf = u.leaf, left = u.leaves, begins = true;
    if (!goes_on) describe(segments[segment]);
  }

  METHOD void describe(const Segment &s) {
    high = s.v4, low = s.v8, stored = s.stored, low_leaf = s.low_leaf;
    describe_round<0>(s, Lines<D, kLow>(s.steps + D, lane));
  }

  template <u32 j> METHOD void describe_round(const Segment &s, const Lines<D, kLow> &lines) {
    if constexpr (j < S::rounds) {
      constexpr u32 source = S::source(j), first = S::first_plane(j);
      constexpr bool goes_on = S::goes_on(j), one_plane = S::one_plane(j);
      u32 line = 4 * j + lane / 8, part = lane % 8;
      if (line >= S::lines) line = S::lines - 1;  // of a lane that copies nothing
      u32 plane = one_plane ? first : S::plane_of(line);
      if constexpr (!goes_on) {
        const u8 *base = plane == 0 ? s.k1 : plane == 1 ? s.k2 : plane == 2 ? s.k3 : plane == 3 ? s.k4 : s.k8;
        u32 bytes = S::plane_lines(plane) * kLine;
        from[source] = base + (line - S::before(plane)) * kLine + part % 4 * 16 + (u64)(leaf + part / 4 - (plane == 4 ? s.low_leaf : 0)) * bytes;
        stride[source] = bytes;
      }
      u32 place = lines.template of<4 * j / 32>(line) * 2 * kLine / 16 + part;
      to[j / 2] = j % 2 == 0 ? place : to[j / 2] | place << 16;
      describe_round<j + 1>(s, lines);
    }
  }

  // copy starts the copies of the next step to a stage.
  METHOD void copy(u32 stage) {
    if (begins) bins(stage + S::bins_at);
    begins = false;
    u32 page = leaf / (kPage / kLeaf);
    bool second = !kValues || left > 1, full = !kValues || stored >= (page + 1) * kPage;
    if (second && full)
      copy_round<0, true>(stage, true);
    else
      copy_round<0, false>(stage, second);
    if (full)
      page_values(stage, high + (u64)page * kPage * (kScale + S::row), second);
    else
      part_values(stage, second);
    advance<0>();
    leaf += 2;
    left = left > 1 ? left - 2 : 0;
    if (left == 0) unit++, next_unit();
  }

  // The bytes a leaf has in the plane, or planes, that a round copies from.
  template <u32 j> METHOD u32 leaf_bytes() const {
    constexpr u32 source = S::source(j), fixed = S::one_stride(j) ? S::plane_lines(S::first_plane(j)) * kLine : 0;
    return fixed ? fixed : stride[source];
  }

  template <u32 j> METHOD void advance() {
    if constexpr (j < S::rounds) {
      constexpr u32 source = S::source(j);
      constexpr bool goes_on = S::goes_on(j);
      if (!goes_on) from[source] += 2 * leaf_bytes<j>();
      advance<j + 1>();
    }
  }

  // bins copies the unit's bins, and the order of the channels behind them.
  METHOD void bins(u32 to) {
    const Segment &s = segments[segment];
    u32 token = leaf * kLeaf, of_body = (s.body + kBins - 1) / kBins;
    u32 group = token < s.body ? token / kBins : of_body + (token - s.body) / kBins;
    const u8 *at = s.steps + kOrder<D> + (u64)group * 4 * D;
    UNROLL for (u32 j = 0; j < (5 * D / 16 + 31) / 32; j++) {
      u32 chunk = 32 * j + lane;
      if (chunk < 5 * D / 16) copy16(to + chunk * 16, chunk < 4 * D / 16 ? at + chunk * 16 : s.steps + (chunk - 4 * D / 16) * 16, true);
    }
  }

  template <u32 j, bool whole> METHOD void copy_round(u32 stage, bool second) {
    if constexpr (j < S::rounds) {
      constexpr u32 source = S::source(j), past = S::past(j);
      bool there = whole || second || lane % 8 < 4;
      const u8 *at = from[source] + past;
      if (4 * j + 4 <= S::lines || lane / 8 < S::lines % 4)
        copy16(stage + (j % 2 == 0 ? to[j / 2] & 0xffff : to[j / 2] >> 16) * 16, there ? at : at - leaf_bytes<j>(), there);
      copy_round<j + 1, whole>(stage, second);
    }
  }

  // page_values copies the values of a step from a full page, which begins at page.
  METHOD void page_values(u32 stage, const u8 *page, bool second) {
    u32 in = leaf % (kPage / kLeaf) * kLeaf, n = second ? kStep : kLeaf;
    bool there = lane * 16 < n * kScale;
    if (lane < S::scales / 16) copy16(stage + S::scales_at + lane * 16, there ? page + in * kScale + lane * 16 : page, there);
    if (!kValues) return;
    row_copies(stage + S::high_at, page + kPage * kScale + in * S::row, n);
    if (kLow) row_copies(stage + S::low_at, low + (u64)(leaf - low_leaf) * kLeaf * S::row, n);
  }

  // part_values copies what there is of a step: its second leaf may be missing. Rows of a segment's last page lie at any address.
  METHOD void part_values(u32 stage, bool second) {
    u32 page = leaf / (kPage / kLeaf), in = leaf % (kPage / kLeaf) * kLeaf;
    u32 tokens = stored - page * kPage < kPage ? stored - page * kPage : kPage;
    const u8 *scales = high + (u64)page * kPage * (kScale + S::row);
    const u8 *rows = scales + tokens * kScale + in * S::row;
    u32 most = second ? kStep : kLeaf, n = tokens - in < most ? tokens - in : most;
    bytes(stage + S::scales_at, scales + in * kScale, n * kScale, S::scales);
    ROLLED for (u32 r = 0; r < kStep; r++) bytes(stage + S::high_at + placed_row<D>(r) * S::row, rows + r * S::row, r < n ? S::row : 0, S::row);
    if (kLow) row_copies(stage + S::low_at, low + (u64)(leaf - low_leaf) * kLeaf * S::row, n);
  }

  METHOD void row_copies(u32 to, const u8 *rows, u32 n) {
    UNROLL for (u32 j = 0; j < S::value_rounds; j++) {
      u32 chunk = j * 32 + lane, r = chunk / (S::row / 16), part = chunk % (S::row / 16) * 16;
      bool there = n == kStep || r < n;
      copy16(to + placed_row<D>(r) * S::row + part, there ? rows + chunk * 16 : rows, there);
    }
  }

  METHOD void bytes(u32 to, const u8 *from, u32 n, u32 room) {
    ROLLED for (u32 i = lane; i < room; i += kWarp) store_byte(to + i, i < n ? from[i] : 0);
  }
};

// Folded is a lane's part of the query, folded with the bins of a unit: of row lane / 4, channels 4t to 4t + 3 of every group. The words' upper and lower
// bytes lie in shared memory, which only this lane reads: there are no registers for them.
template <u32 D> struct Folded {
  u32 words;            // where: upper bytes, then lower, 256 bytes a group
  u32 tables;           // where: Other of each of the others, then which bits each group's second line has, 4 bytes a group
  u32 others;           // how many, rounded up to an even number
  float scale, offset;  // of the row; scores in log2
  u32 ones, twos;       // as in Lines

  // Other is what is to be known of a line: 16 bytes.
  struct Other {
    u32 words, line, turn, bits;  // where, above words and the first line; twice the level; which bits of codes it has
  };
  static constexpr u32 second_bits = D / 16 * sizeof(Other);  // where they begin: there are no more others than groups

  // begin makes words of rows that there are not.
  template <bool kLow> METHOD void begin(u32 rows) {
    if (!kShares<D, kLow> || rows > kRows / 2) return;
    UNROLL for (u32 g = 0; g < D / 16; g++) store_shared2(words + 256 * g, u32x2{0, 0});
  }

  METHOD Other other(u32 i) const {
    u32x4 x = load_shared4(tables + i * sizeof(Other));
    return {x.x, x.y, x.z, x.w};
  }

  template <bool kLow> METHOD void tell(const Lines<D, kLow> &l, u32 lane) {
    ones = l.ones, twos = l.twos;
    if (kLow) return;
    UNROLL for (u32 j = 0; j < l.words; j++)
      if (l.level[j] >= 2 && l.other[j] < D / 16) {
        u32 turn = 2 * l.level[j] % 8;
        store_shared4(tables + l.other[j] * sizeof(Other), u32x4{256 * l.group[j], 2 * kLine * l.place[j], turn, kFirst >> turn});
      }
    others = (l.others + 1) / 2 * 2;
    if (others > D / 16) others = D / 16;
    if (lane == 0 && others > l.others) store_shared4(tables + l.others * sizeof(Other), u32x4{0, 0, 0, 0});
    if (lane < D / 16) store_shared1(tables + second_bits + 4 * lane, (ones | twos) >> lane & 1 ? kFirst >> 2 : 0);
  }
};

// forget makes x a number that nothing is known of: what was computed of it is not kept in registers but computed again.
DEVICE void forget(u32 &x) { asm volatile("" : "+r"(x)); }

// fold brings the bins of a group of tokens, in a stage, into the query rows q, which lie in shared memory, as attention/kernels does: the words are the
// same to the last bit. exponent is that of the bins. Of up to 4 rows, lanes 16 on, which have none of their own, do half of the groups.
template <u32 D, bool kLow> DEVICE void fold(Folded<D> &f, u32 bins, int exponent, u32 q, u32 rows, float softcap, u32 lane) {
  bool few = kShares<D, kLow> && rows <= kRows / 2, helps = few && lane >= kWarp / 2;
  if constexpr (D == 64) forget(lane);
  u32 t = lane % 4, first = helps ? D / 32 : 0, groups = few ? D / 32 : D / 16, own = helps ? lane - kWarp / 2 : lane;
  u32 to = f.words - (lane - own) * 8;
  q += own / 4 * kPitch<D> * 4;
  float unit2 = bits<float>((u32)(exponent + 127) << 23);
  // each calls use for the 4 channels of group g: for each the query in units of the bins' numbers, its bin, and the product of both.
  auto each = [&](u32 g, float width, auto use) {
    u32 place = 16 * g + 4 * t;
    u32 channels = load_shared1(bins + 4 * D + place);
    u32x2 lo = load_shared2(bins + kLine * g + 8 * t), step = load_shared2(bins + kLine * g + kLine / 2 + 8 * t);
    UNROLL for (u32 b = 0; b < 4; b++) {
      float x = bits<float>(load_shared1(q + 4 * pick_bytes(channels, 0, 0x4440 | b)));
      x = mul(x, unit2);
      float low = widen_half((b < 2 ? lo.x : lo.y) >> 16 * (b & 1) & 0xffff), size = widen_half((b < 2 ? step.x : step.y) >> 16 * (b & 1) & 0xffff);
      use(b, x, low, size, mul(mul(x, size), width));
    }
  };
  // What codes of a group mean, of which so many lines are known: attention/kernels, places.
  auto level_of = [&](u32 g) { return 1 + (f.ones >> g & 1) + 2 * (f.twos >> g & 1); };
  float offset = 0, most = 0;
  ROLLED for (u32 g = first; g < first + groups; g++) {
    u32 level = level_of(g);
    float half = bits<float>((134 - 2 * level) << 23);  // 2^(7 - 2 level)
    float at = level == 1 ? 128 + (half - 128) * kShrink : half;
    each(g, level == 1 ? kShrink : 1, [&](u32, float x, float low, float size, float product) {
      offset += x * (low + size * at);
      most = __builtin_fmaxf(most, __builtin_fabsf(product));
    });
  }
  most = quad_max(most);
  if (few) most = __builtin_fmaxf(most, shuffle_xor(most, kWarp / 2));
  const WordUnit of(most);
  float unit = of.unit, inverse = of.inverse;
  ROLLED for (u32 g = first; g < first + groups; g++) {  // read again: there are no registers for all products
    u32 level = level_of(g);
    float middle = 128 - bits<float>((134 - 2 * level) << 23);
    u32 words[4];
    each(g, level == 1 ? kShrink : 1, [&](u32 b, float, float, float, float product) {
      float word = add(mul(product, inverse), kRounder);
      words[b] = bits_of(word);
      offset += (product - mul(word - kRounder, unit)) * middle;
    });
    store_shared2(to + 256 * g, signed_bytes(words));
  }
  offset = quad_sum(offset);
  if (few) offset += shuffle_xor(offset, kWarp / 2);
  float log2 = helps ? 0 : softcap != 0 ? 1 : kLog2e;
  f.scale = unit * log2, f.offset = offset * log2;
  if (!kLow) sync_warp();  // for the tables, and others' words
}

// Sums are a lane's part of a running softmax.
template <u32 D> struct Sums {
  float values[D / 16][4];  // tile i: channels word g + i and D/2 + that, of rows 2t and 2t + 1; units of (p scale 2^norm)
  float most;               // of row g: the reference of weights, log2
  float weights, offsets;   // of row g, this lane's tokens
  int norm;                 // a step times 2^norm is at most 1
};

// products makes the sums of words times codes of a step, in two parts: those of upper bytes, to be taken 256 times, and of lower ones.
template <u32 D, bool kLow> DEVICE void products(int (&c)[4][4], const Folded<D> &f, u32 stage, u32 lane) {
  constexpr u32 line = 2 * kLine, groups = D / 16;
  u32 at = stage + lane / 4 * 16, t = lane % 4, left = 64 >> 2 * t, turn = 2 * t + 26;
  UNROLL for (u32 four = 0; four < groups / 4; four++) {
    u32x4 second = {};
    if (!kLow) second = load_shared4(f.tables + f.second_bits + 16 * four);
    UNROLL for (u32 pair = 2 * four; pair < 2 * four + 2; pair++) {
      u32 codes[2][4];
      UNROLL for (u32 h = 0; h < 2; h++) {
        u32 g = 2 * pair + h;
        UNROLL for (u32 level = 0; level < (kLow ? kLevels : 2); level++) {
          u32x4 w = load_shared4(at + (level * groups + g) * line);
          u32 bits = kLow || level == 0 ? kFirst >> 2 * level : second[g % 4];
          UNROLL for (u32 i = 0; i < 4; i++) {
            if (level == 0)
              codes[h][i] = w[i] * left & bits;  // a shift, by units that have time for it
            else
              codes[h][i] |= rotate_right(w[i], turn + 2 * level) & bits;
          }
        }
      }
      u32x2 first = load_shared2(f.words + 512 * pair), next = load_shared2(f.words + 512 * pair + 256);
      UNROLL for (u32 i = 0; i < 4; i++) multiply(c[i], first.x, first.y, next.x, next.y, codes[0][i], codes[1][i]);
    }
  }
  if (kLow) return;
  auto others = [&](u32 i) {  // two
    u32 codes[2][4];
    u32x2 words[2];
    UNROLL for (u32 h = 0; h < 2; h++) {
      auto other = f.other(i + h);
      u32x4 w = load_shared4(at + other.line);
      words[h] = load_shared2(f.words + other.words);
      UNROLL for (u32 j = 0; j < 4; j++) codes[h][j] = rotate_right(w[j], turn + other.turn) & other.bits;
    }
    UNROLL for (u32 j = 0; j < 4; j++) multiply(c[j], words[0].x, words[0].y, words[1].x, words[1].y, codes[0][j], codes[1][j]);
  };
  constexpr u32 always = D == 64 ? 0 : Shape<D, kLow>::behind;  // dimension 64 has no registers to read ahead
  UNROLL for (u32 i = 0; i < always; i += 2) others(i);
  ROLLED for (u32 i = always; i < f.others; i += 2) others(i);
}

template <u32 D, bool kLow> DEVICE void scores(float (&x)[4][2], const Folded<D> &f, u32 stage, u32 lane, float softcap) {
  int c[4][4] = {};
  products<D, kLow>(c, f, stage, lane);
  UNROLL for (u32 i = 0; i < 4; i++)
    UNROLL for (u32 e = 0; e < 2; e++) x[i][e] = (float)(c[i][e] * 256 + c[i][2 + e]) * f.scale + f.offset;
  if (softcap != 0) {
    UNROLL for (u32 i = 0; i < 4; i++)
      UNROLL for (u32 e = 0; e < 2; e++) x[i][e] = cap(x[i][e], softcap);
  }
}

// add_rows takes in 32 tokens of such scores, steps and zero points, the rows of whose values lie at high and low.
template <u32 D, bool kLow>
DEVICE void add_rows(Sums<D> &s, const float (&x)[4][2], const float (&step)[4][2], const float (&zero)[4][2], u32 high, u32 low, u32 lane) {
  using S = Shape<D, kLow>;
  u32 g = lane / 4, t = lane % 4;
  float top = kLowest, longest = 0;
  UNROLL for (u32 i = 0; i < 4; i++)
    UNROLL for (u32 e = 0; e < 2; e++) top = __builtin_fmaxf(top, x[i][e]), longest = __builtin_fmaxf(longest, step[i][e]);
  // Weights are of up to 2^8, steps normalised to less than 1: their products are no more than binary16 holds. References change seldom.
  int exponent = 126 - (int)(bits_of(longest) >> 23);  // longest 2^exponent is in [.5, 1)
  if (any(top > s.most + 8 || exponent < s.norm)) {
    float most = __builtin_fmaxf(s.most, quad_max(top));
    UNROLL for (u32 m = 4; m < kWarp; m *= 2) longest = __builtin_fmaxf(longest, shuffle_xor(longest, m));
    longest = __builtin_fmaxf(longest, shuffle_xor(longest, 1));
    longest = __builtin_fmaxf(longest, shuffle_xor(longest, 2));
    exponent = 126 - (int)(bits_of(longest) >> 23);
    int norm = exponent < s.norm ? exponent : s.norm;
    float fade = exp2(s.most - most), by = fade * exp2((float)(norm - s.norm));
    s.weights *= fade, s.offsets *= by, s.most = most, s.norm = norm;
    float first = shuffle(by, 8 * t), second = shuffle(by, 8 * t + 4);
    UNROLL for (u32 i = 0; i < D / 16; i++)
      s.values[i][0] *= first, s.values[i][1] *= second, s.values[i][2] *= first, s.values[i][3] *= second;
  }
  float unit = exp2((float)s.norm);
  u32 p[4];
  UNROLL for (u32 i = 0; i < 4; i++) {
    float w[2];
    UNROLL for (u32 e = 0; e < 2; e++) {
      float weight = exp2(x[i][e] - s.most);
      s.weights += weight;
      w[e] = weight * (step[i][e] * unit);
    }
    p[i] = halves(w[0], w[1]);
    s.offsets += widen_half(p[i] & 0xffff) * zero[i][0] + widen_half(p[i] >> 16) * zero[i][1];
  }
  UNROLL for (u32 half = 0; half < 2; half++) {  // tiles 0 and 1, 2 and 3
    u32 rows[4][S::word / 4], lows[4][S::word / 4];
    UNROLL for (u32 k = 0; k < 4; k++) {
      u32 token = 8 * t + 2 * half + (k & 1) + 4 * (k >> 1);
      u32 at = placed_row<D>(token) * S::row + g * S::word;
      if (S::word == 4) {
        rows[k][0] = load_shared1(high + at);
        if (kLow) lows[k][0] = load_shared1(low + at);
      } else if (S::word == 8) {
        u32x2 w = load_shared2(high + at);
        rows[k][0] = w.x, rows[k][S::word / 4 - 1] = w.y;
        if (kLow) w = load_shared2(low + at), lows[k][0] = w.x, lows[k][S::word / 4 - 1] = w.y;
      } else {
        u32x4 w = load_shared4(high + at);
        UNROLL for (u32 j = 0; j < S::word / 4; j++) rows[k][j] = w[j];
        if (kLow) {
          w = load_shared4(low + at);
          UNROLL for (u32 j = 0; j < S::word / 4; j++) lows[k][j] = w[j];
        }
      }
    }
    UNROLL for (u32 i = 0; i < D / 16; i++) {
      // Codes go in as they are: as binary16 they are numbers too small to have an exponent, of units of 2^-24.
      constexpr u32 lower = 0x000f000f, upper = 0x00f000f0;
      u32 sel = (i % 4) | (4 + i % 4) << 8;
      u32 even = pick_bytes(rows[0][i / 4], rows[2][i / 4], sel), odd = pick_bytes(rows[1][i / 4], rows[3][i / 4], sel);
      u32 a0 = even & lower, a1 = even & upper, a2 = odd & lower, a3 = odd & upper;
      if (kLow) {
        even = pick_bytes(lows[0][i / 4], lows[2][i / 4], sel), odd = pick_bytes(lows[1][i / 4], lows[3][i / 4], sel);
        a0 = a0 * 16 | (even & lower), a1 |= even >> 4 & lower, a2 = a2 * 16 | (odd & lower), a3 |= odd >> 4 & lower;
      }
      multiply(s.values[i], a0, a1, a2, a3, p[2 * half], p[2 * half + 1]);
    }
  }
}

// add takes in a step's tokens [skip, n).
template <u32 D, bool kLow> DEVICE void add(Sums<D> &s, float (&x)[4][2], u32 stage, u32 lane, u32 skip, u32 n) {
  using S = Shape<D, kLow>;
  u32 t = lane % 4;
  // Steps and zero points of tokens 8t to 8t + 7; of tile i, columns 2t and 2t + 1 are 8t + i and 8t + 4 + i.
  float step[4][2], zero[4][2];  // zero: what the middle of the bin of code 0 is above the zero point
  UNROLL for (u32 e = 0; e < 2; e++) {
    u32 at = stage + S::scales_at + 24 * t + 12 * e;
    u32 w0 = load_shared1(at), w1 = load_shared1(at + 4), w2 = load_shared1(at + 8);
    u32 b[4] = {w0 & 0xffff, pick_bytes(w0, w1, 0x43) & 0xffff, w1 >> 16, w2 >> 8 & 0xffff};
    u32 z[4] = {w0 >> 16 & 255, w1 >> 8 & 255, w2 & 255, w2 >> 24};
    UNROLL for (u32 i = 0; i < 4; i++) {
      step[i][e] = bits<float>(b[i] << 15);
      zero[i][e] = 8388608.f - bits<float>(0x4b000000u | z[i]) + (kLow ? .5f : 8);  // 2^23
    }
  }
  bool part = skip > 0 || n < kStep;
  if (part) {
    UNROLL for (u32 i = 0; i < 4; i++)
      UNROLL for (u32 e = 0; e < 2; e++) {
        u32 token = 8 * t + 4 * e + i;
        if (token < skip || token >= n) x[i][e] = -__builtin_inff(), step[i][e] = 0, zero[i][e] = 0;
      }
  }
  add_rows<D, kLow>(s, x, step, zero, stage + S::high_at, stage + S::low_at, lane);
}

// store writes a partial: for each row the log2 of the unit of weights and their sum, and the sum of weighted values.
template <u32 D, bool kLow> DEVICE void store(const Sums<D> &s, float *ml, float *out, u32 rows, u32 lane) {
  u32 g = lane / 4, t = lane % 4;
  float weights = quad_sum(s.weights), offsets = quad_sum(s.offsets);
  float unit = exp2((float)-s.norm);
  if (t == 0 && g < rows) ml[2 * g] = s.most, ml[2 * g + 1] = weights;
  UNROLL for (u32 e = 0; e < 2; e++) {
    u32 row = 2 * t + e;
    float offset = shuffle(offsets, 4 * row);
    if (row < rows) {
      UNROLL for (u32 h = 0; h < 2; h++)
        UNROLL for (u32 i = 0; i < D / 16; i++) {
          constexpr float code = 0x1p24f;  // of 8 bits; the upper 4 of channels of h 0 lie 4 bits further down
          out[row * D + h * (D / 2) + g * (D / 16) + i] = (s.values[i][2 * h + e] * (h == 0 && !kLow ? 16 * code : code) + offset) * unit;
        }
    }
  }
}

// A block's shared memory: the query rows, then for each of 4 warps folded words and stages.
template <u32 D> constexpr u32 kQueryBytes = kRows * kPitch<D> * 4;
template <u32 D> constexpr u32 kWordBytes = D / 16 * 256;
template <u32 D, bool kLow> constexpr u32 kTableBytes = kLow ? 0 : (D / 16 * 20 + 127) / 128 * 128;
template <u32 D, bool kLow, u32 depth> constexpr u32 kWarpBytes = kWordBytes<D> + kTableBytes<D, kLow> + depth * Shape<D, kLow>::stage;

// attend_split attends split index. depth is how many steps are in shared memory: with 2 the copies of a step are under way while the step before is
// computed.
template <u32 D, bool kLow, u32 depth>
DEVICE void attend_split(const Segment *segments, const Unit *units, const Split &split, u32 q, u32 words, u32 stages, float *ml, float *out, u32 rows,
                         float softcap, u32 lane) {
  using S = Shape<D, kLow>;
  Stager<D, kLow> stager;
  Folded<D> folded;
  folded.words = words + lane * 8, folded.tables = words + kWordBytes<D>;
  folded.template begin<kLow>(rows);
  Sums<D> sums = {};
  sums.most = kLowest, sums.norm = 126;
  Unit u = {};
  u32 segment = ~0u, tokens = 0, at = 0, i = split.first;
  stager.begin(segments, units, split.first, split.end);
  for (u32 round = 0; i < split.end; round++) {
    if (!stager.done()) stager.copy(stages + round % depth * S::stage);
    copies_end_group();
    if (round + 1 < depth) continue;
    wait_copies<depth - 1>();
    sync_warp();
    u32 stage = stages + (round + 1) % depth * S::stage;
    if constexpr (depth == 1) forget(stage);  // else addresses in the only stage, which never change, take all registers
    if (at == 0) {
      u = units[i];
      const Segment &s = segments[u.segment];
      if (u.segment != segment) {
        segment = u.segment;
        folded.tell(Lines<D, kLow>(s.steps + D, lane), lane);
      }
      fold<D, kLow>(folded, stage + S::bins_at, s.exponent, q, rows, softcap, lane);
      tokens = s.stored - u.leaf * kLeaf;
      if (tokens > u.leaves * kLeaf) tokens = u.leaves * kLeaf;
    }
    float x[4][2];
    scores<D, kLow>(x, folded, stage, lane, softcap);
    add<D, kLow>(sums, x, stage, lane, at == 0 ? u.skip * kLeaf : 0, tokens - at < kStep ? tokens - at : kStep);
    sync_warp();
    at += kStep;
    if (at >= u.leaves * kLeaf) at = 0, i++;
  }
  store<D, kLow>(sums, ml, out, rows, lane);
}

// Arguments of the kernels: q is [heads][rows][D], scaled; partials go to ml [splits][rows][2] and out [splits][rows][D], rotated. A block of 4 warps has 4
// splits of one head, from first on, one a warp; some may be empty.
struct Arguments {
  const Segment *segments;
  const Unit *units;
  const Split *splits;
  const float *q;
  float *ml, *out;
  u32 first, rows;
  float softcap;
};

template <u32 D, bool kLow, u32 depth> DEVICE void attend(const Arguments &a, u32 block, u8 *memory) {
  u32 lane = THREAD % kWarp, warp = THREAD / kWarp;
  u32 index = a.first + block * 4 + warp, row = BLOCK_Y * kRows;
  const Split split = a.splits[index];
  u32 rows = a.rows - row < kRows ? a.rows - row : kRows;
  take_rows<D>(a.q + ((u64)split.head * a.rows + row) * D, rows, (float *)memory);
  u32 room = shared_address(memory) + kQueryBytes<D> + warp * kWarpBytes<D, kLow, depth>;
  u64 partial = (u64)index * a.rows + row;
  attend_split<D, kLow, depth>(a.segments, a.units, split, shared_address(memory), room, room + kWarpBytes<D, kLow, 0>, a.ml + partial * 2,
                               a.out + partial * D, rows, a.softcap, lane);
}

// HEAD_DIM and how many blocks a multiprocessor is to hold come from the command line: a module a head dimension.
#define PARAMETERS                                                                                                                     \
  const Segment *segments, const Unit *units, const Split *splits, const float *q, float *ml, float *out, u64 first, u64 rows, u64 softcap
#define ARGUMENTS {segments, units, splits, q, ml, out, (u32)first, (u32)rows, bits<float>((u32)softcap)}

extern __attribute__((shared)) __attribute__((aligned(128))) u8 shared_memory[];

#ifndef PARTS  // of which others make kernels of their own

// attend: the first blocks, so many, attend splits of drains, whose last bits are known; they are few, one step each, so that copying ahead would not pay.
KERNEL void BOUNDS(128, BLOCKS) attend(PARAMETERS, u64 drains) {
  Arguments a = ARGUMENTS;
  if (BLOCK_X < (u32)drains)
    attend<HEAD_DIM, true, 1>(a, BLOCK_X, shared_memory);
  else
    attend<HEAD_DIM, false, 2>(a, BLOCK_X, shared_memory);
}

// attend_low: of all tokens all bits are known.
KERNEL void BOUNDS(128, BLOCKS_LOW) attend_low(PARAMETERS) {
  Arguments a = ARGUMENTS;
  attend<HEAD_DIM, true, 2>(a, BLOCK_X, shared_memory);
}

// Runs are a head's splits: four ranges [4][2], each from the first number up to the second.
struct Runs {
  u32 k, n, m, all, first, second, third, fourth;

  METHOD Runs(const u32 *r)
      : k(r[1] - r[0]), n(k + r[3] - r[2]), m(n + r[5] - r[4]), all(m + r[7] - r[6]), first(r[0]), second(r[2] - k), third(r[4] - n), fourth(r[6] - m) {}

  // at returns where the partial of split i's row is.
  METHOD u64 at(u32 i, u32 rows, u32 row) const {
    u32 by = fourth;
    if (i < m) by = third;
    if (i < n) by = second;
    if (i < k) by = first;
    return (u64)(i + by) * rows + row;
  }
};

// merge makes one partial of those of each head's row: its splits are those of ranges [heads][4][2]. ml [splits][rows][2] and out [splits][rows][D] become merged_ml [heads][rows][2] and merged [heads][rows][D]. A block of 8 warps does 32 channels.
// Where there are errors (select.cu, rest) of the splits in the fourth range, which begin with split first, their sums become merged_errors [heads][rows][3].
KERNEL void BOUNDS(256, 4) merge(const u32 *ranges, const float *ml, const float *out, float *merged_ml, float *merged, u64 rows64, const float *errors,
                                 float *merged_errors, u64 first) {
  constexpr u32 D = HEAD_DIM, kWarps = 8;
  SHARED static float sums[kWarps][kWarp], maxima[kWarps], weights[kWarps];
  u32 rows = (u32)rows64, lane = THREAD % kWarp, warp = THREAD / kWarp;
  u32 pair = BLOCK_X / (D / kWarp), channel = BLOCK_X % (D / kWarp) * kWarp + lane;
  u32 head = pair / rows, row = pair % rows;
  const Runs runs(ranges + 8 * head);
  u32 all = runs.all;
  float most = kLowest;
  for (u32 i = THREAD; i < all; i += kWarps * kWarp) most = __builtin_fmaxf(most, ml[runs.at(i, rows, row) * 2]);
  UNROLL for (u32 x = 1; x < kWarp; x *= 2) most = __builtin_fmaxf(most, shuffle_xor(most, x));
  if (lane == 0) maxima[warp] = most;
  sync_block();
  UNROLL for (u32 i = 0; i < kWarps; i++) most = __builtin_fmaxf(most, maxima[i]);
  float sum = 0, weight = 0;
  UNROLL4 for (u32 i = warp; i < all; i += kWarps) {
    u64 x = runs.at(i, rows, row);
    float by = exp2(ml[x * 2] - most);
    weight += ml[x * 2 + 1] * by;
    sum += out[x * D + channel] * by;
  }
  sums[warp][lane] = sum;
  if (lane == 0) weights[warp] = weight;
  sync_block();
  if (warp != 0) return;
  sum = 0, weight = 0;
  UNROLL for (u32 i = 0; i < kWarps; i++) sum += sums[i][lane], weight += weights[i];
  merged[(u64)pair * D + channel] = sum;
  if (channel == 0) merged_ml[pair * 2] = most, merged_ml[pair * 2 + 1] = weight;
  if (errors == nullptr || channel >= kWarp) return;
  float spreads = 0, noises = 0, tokens = 0;
  for (u32 i = runs.m + lane; i < all; i += kWarp) {
    u64 x = runs.at(i, rows, row), from = x - first * rows;
    float by = exp2(2 * (ml[x * 2] - most));
    spreads += errors[from * 3] * by, noises += errors[from * 3 + 1] * by, tokens += errors[from * 3 + 2];
  }
  UNROLL for (u32 x = 1; x < kWarp; x *= 2) spreads += shuffle_xor(spreads, x), noises += shuffle_xor(noises, x), tokens += shuffle_xor(tokens, x);
  if (lane == 0) merged_errors[pair * 3] = spreads, merged_errors[pair * 3 + 1] = noises, merged_errors[pair * 3 + 2] = tokens;
}

#endif
