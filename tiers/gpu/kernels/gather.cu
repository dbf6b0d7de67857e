// Attention to the pages that were chosen (select.cu), where they lie: all their keys are scored, and the values of those tokens are read that weigh enough in
// any of the rows. What the others of a page weigh is left to rest.
//
// A warp works as in attend.cu, but its steps have keys and scales alone. Tokens whose values are to be read wait in a queue; as soon as there are 32 of them, copies
// of their rows are begun, and one step later they are taken in together. So rows are read, and multiplied, that count, and no others.
#ifndef PARTS
#define PARTS  // of attend.cu
#define GATHERS
#endif
#include "attend.cu"

// Chosen is what choose says of the pages, and what becomes of the tokens that are not read: masses and rules [pages][rows] get theirs instead of the whole
// pages', read [pages][blocks of rows][2] says which were, a bit each.
struct Chosen {
  const u32 *numbers;  // of units' first pages
  const float *cuts;   // [heads][rows]
  float *masses;
  Rule *rules;
  u32 *read;
};

// Queue is a warp's tokens whose values are to be read, in shared memory: a ring of three batches. One is under way, one waits or is taken in, one is filled.
template <u32 D, bool kLow> struct Queue {
  using S = Shape<D, kLow>;
  static constexpr u32 ring = 3 * kStep, pitch = ring + 4;  // of rows of scores, whose equal tokens are in different banks
  static constexpr u32 address = kLow ? 16 : 8;             // bytes of a token's addresses: of high codes, and of low ones
  static constexpr u32 rows = kStep * S::row * (kLow ? 2 : 1);
  static constexpr u32 scales_at = kRows * pitch * 4, addresses_at = scales_at + ring * 4, rows_at = addresses_at + ring * address, size = rows_at + rows;
  u32 at;             // in shared memory
  u32 first, count;   // of the tokens that wait: the first's place, which begins a batch, and how many there are
  u32 under;          // place of the batch that is under way

  METHOD static u32 wrap(u32 place) { return place < ring ? place : place - ring; }

  // push appends the tokens of a step that mask has: x as scores leaves them, scales in stage, rows of values at high and low. The weights of the others, in units
  // of cut, and their squares are added to sums.
  METHOD void push(const float (&x)[4][2], float cut, u32 mask, f32x2 &sums, u32 scales, const u8 *high, const u8 *low, u32 lane) {
    u32 g = lane / 4, t = lane % 4, own = mask >> 8 * t, place = wrap(first + count + count_ones(mask & ((1u << 8 * t) - 1)));
    u32 row = at + g * pitch * 4, to = row + 4 * place, end = row + 4 * ring;
    UNROLL for (u32 i = 0; i < 8; i++) {
      float score = x[i % 4][i / 4];
      if (own >> i & 1) {
        store_shared1(to, bits_of(score));
        to = to + 4 == end ? row : to + 4;
      } else {
        float weight = exp2(score - cut);
        sums.x += weight, sums.y += weight * weight;
      }
    }
    if (mask >> lane & 1) {
      place = wrap(first + count + count_ones(mask & ((1u << lane) - 1)));
      u32 scale = scales + lane * kScale;
      store_shared1(at + scales_at + 4 * place, load_byte(scale) | load_byte(scale + 1) << 8 | load_byte(scale + 2) << 16);
      u64 h = (u64)(high + lane * S::row), l = (u64)(low + lane * S::row);
      if (kLow)
        store_shared4(at + addresses_at + address * place, u32x4{(u32)h, (u32)(h >> 32), (u32)l, (u32)(l >> 32)});
      else
        store_shared2(at + addresses_at + address * place, u32x2{(u32)h, (u32)(h >> 32)});
    }
    count += count_ones(mask);
  }

  // fetch begins to copy the next batch's rows. Tokens that it lacks weigh nothing.
  METHOD void fetch(u32 lane) {
    u32 n = count < kStep ? count : kStep;
    if (lane >= n) {
      UNROLL for (u32 r = 0; r < kRows; r++) store_shared1(at + (r * pitch + first + lane) * 4, bits_of(-__builtin_inff()));
      store_shared1(at + scales_at + 4 * (first + lane), 0);
    }
    UNROLL for (u32 j = 0; j < S::value_rounds; j++) {
      u32 chunk = j * 32 + lane, r = chunk / (S::row / 16), part = chunk % (S::row / 16) * 16, to = at + rows_at + placed_row<D>(r) * S::row + part;
      if (r >= n) r = 0;  // of a lane that copies nothing
      bool there = chunk / (S::row / 16) < n;
      u32 from = at + addresses_at + address * (first + r);
      if (kLow) {
        u32x4 a = load_shared4(from);
        copy16(to, (const u8 *)((u64)a.y << 32 | a.x) + part, there);
        copy16(to + kStep * S::row, (const u8 *)((u64)a.w << 32 | a.z) + part, there);
      } else {
        u32x2 a = load_shared2(from);
        copy16(to, (const u8 *)((u64)a.y << 32 | a.x) + part, there);
      }
    }
    under = first, first = wrap(first + kStep), count -= n;
  }

  // add takes in the batch that was under way.
  METHOD void add(Sums<D> &sums, u32 lane) const {
    u32 g = lane / 4, t = lane % 4;
    float x[4][2], step[4][2], zero[4][2];
    UNROLL for (u32 e = 0; e < 2; e++) {
      u32 place = under + 8 * t + 4 * e;
      u32x4 score = load_shared4(at + (g * pitch + place) * 4), scale = load_shared4(at + scales_at + 4 * place);
      UNROLL for (u32 i = 0; i < 4; i++) {
        x[i][e] = bits<float>(score[i]);
        step[i][e] = bits<float>((scale[i] & 0xffff) << 15);
        zero[i][e] = 8388608.f - bits<float>(0x4b000000u | scale[i] >> 16) + (kLow ? .5f : 8);  // 2^23, as in attend.cu
      }
    }
    add_rows<D, kLow>(sums, x, step, zero, at + rows_at, at + rows_at + kStep * S::row, lane);
  }
};

template <u32 D, bool kLow> constexpr u32 kGatherBytes = kWordBytes<D> + kTableBytes<D, kLow> + 2 * Shape<D, kLow, false>::stage + Queue<D, kLow>::size;

// gather_split attends split index, of units of whole pages; row is the first of its rows.
template <u32 D, bool kLow> DEVICE void gather_split(const Arguments &a, const Chosen &to, const Split &split, u32 index, u32 q, u32 words, u32 row, u32 rows, u32 lane) {
  using S = Shape<D, kLow, false>;
  u32 stages = words + kWordBytes<D> + kTableBytes<D, kLow>;
  Stager<D, kLow, false> stager;
  Queue<D, kLow> queue = {stages + 2 * S::stage, 0, 0, 0};
  Folded<D> folded;
  folded.words = words + lane * 8, folded.tables = words + kWordBytes<D>;
  folded.template begin<kLow>(rows);
  Sums<D> sums = {};
  sums.most = kLowest, sums.norm = 126;
  float cut = lane / 4 < rows ? to.cuts[split.head * a.rows + row + lane / 4] : __builtin_inff();
  f32x2 left = 0;  // weights of a page's tokens that are not read, in units of cut, and their squares
  Unit u = {};
  u32 segment = ~0u, bins = ~0u, number = 0, at = 0, i = split.first;
  bool coming = false;  // a batch of values is under way
  stager.begin(a.segments, a.units, split.first, split.end);
  if (!stager.done()) stager.copy(stages);
  copies_end_group();
  for (u32 round = 0;; round++) {
    if (!stager.done()) stager.copy(stages + (round + 1) % 2 * S::stage);
    copies_end_group();
    wait_copies<1>();  // for this step, and for the values that were fetched before the next one's copies began
    sync_warp();
    if (coming) {
      queue.add(sums, lane);
      sync_warp();
    }
    bool more = i < split.end;
    coming = queue.count >= kStep || (!more && queue.count > 0);
    if (coming) queue.fetch(lane);
    copies_end_group();
    if (!more && !coming) break;
    if (!more) continue;
    u32 stage = stages + round % 2 * S::stage;
    if (at == 0) {
      // Two runs of one candidate's pages share bins, and what the query is folded to.
      u = a.units[i], number = to.numbers[i];
      const Segment &s = a.segments[u.segment];
      bool same = u.segment == segment && u.leaf / (kBins / kLeaf) == bins;
      if (u.segment != segment) {
        segment = u.segment;
        folded.tell(Lines<D, kLow>(s.steps + D, lane), lane);
      }
      bins = u.leaf / (kBins / kLeaf);
      if (!same) fold<D, kLow>(folded, stage + S::bins_at, s.exponent, q, rows, a.softcap, lane);
    }
    float x[4][2];
    scores<D, kLow>(x, folded, stage, lane, a.softcap);
    if constexpr (D == 64) forget(lane);  // short of registers: g and t are computed again
    u32 g = lane / 4, t = lane % 4, mask = 0;
    UNROLL for (u32 j = 0; j < 8; j++) mask = shift_in(mask, bits_of(x[(7 - j) % 4][(7 - j) / 4] - cut));  // signs
    mask = (mask ^ 255) << 8 * t;
    UNROLL for (u32 by = 1; by < kWarp; by *= 2) mask |= shuffle_xor(mask, by);
    u32 token = u.leaf * kLeaf + at;
    const Segment &s = a.segments[u.segment];
    const u8 *high = s.v4 + (u64)(token / kPage) * kPage * (kScale + S::row) + kPage * kScale + token % kPage * S::row;
    queue.push(x, cut, mask, left, stage + S::scales_at, high, kLow ? s.v8 + (u64)token * S::row : nullptr, lane);
    u32 page = number + at / kPage;
    if (lane == 0) to.read[((u64)page * BLOCKS_Y + BLOCK_Y) * 2 + at / kStep % 2] = mask;
    at += kStep;
    if (at % kPage == 0) {
      float weights = quad_sum(left.x), squares = quad_sum(left.y);
      bool tell = weights > 0x1p-40f;
      if (t == 0 && g < rows) {
        u64 n = (u64)page * a.rows + row + g;
        to.masses[n] = tell ? cut + log2(weights) : kLowest;
        to.rules[n] = {tell ? squares * reciprocal(weights * weights) : 0, 0};
      }
      left = 0;
    }
    sync_warp();
    if (at >= u.leaves * kLeaf) at = 0, i++;
  }
  u64 partial = (u64)index * a.rows + row;
  store<D, kLow>(sums, a.ml + partial * 2, a.out + partial * D, rows, lane);
}

template <u32 D, bool kLow> DEVICE void gather(const Arguments &a, const Chosen &to, u8 *memory) {
  u32 lane = THREAD % kWarp, warp = THREAD / kWarp, index = a.first + BLOCK_X * 4 + warp, row = BLOCK_Y * kRows;
  const Split split = a.splits[index];
  u32 rows = a.rows - row < kRows ? a.rows - row : kRows;
  take_rows<D>(a.q + ((u64)split.head * a.rows + row) * D, rows, (float *)memory);
  u32 words = shared_address(memory) + kQueryBytes<D> + warp * kGatherBytes<D, kLow>;
  gather_split<D, kLow>(a, to, split, index, shared_address(memory), words, row, rows, lane);
}

#ifdef GATHERS

#define CHOSEN const u32 *numbers, const float *cuts, float *masses, Rule *rules, u32 *read

// attend_chosen attends what choose listed.
KERNEL void BOUNDS(128, BLOCKS) attend_chosen(PARAMETERS, CHOSEN) { gather<HEAD_DIM, false>(ARGUMENTS, {numbers, cuts, masses, rules, read}, shared_memory); }

// attend_chosen_low: of all tokens all bits are known.
KERNEL void BOUNDS(128, BLOCKS_LOW) attend_chosen_low(PARAMETERS, CHOSEN) {
  gather<HEAD_DIM, true>(ARGUMENTS, {numbers, cuts, masses, rules, read}, shared_memory);
}

#endif
