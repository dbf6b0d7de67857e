// Kernels for tests alone: what attend and scan compute on their way, in integers, which have to be those of the host.
#define PARTS
#include "gather.cu"
#include "select.cu"

// probe attends nothing: of unit BLOCK_X, for up to 8 query rows q [rows][D], it writes the folded words [unit][8][D], channels in stored order, and of each
// token the sums of words times codes, [unit][256][8].
template <u32 D, bool kLow> DEVICE void probe_unit(const Segment *segments, const Unit *units, const float *from, int *words, int *sums, u32 rows, u8 *memory) {
  using S = Shape<D, kLow>;
  u32 lane = THREAD, index = BLOCK_X, g = lane / 4, t = lane % 4;
  float *q = (float *)memory;
  for (u32 i = lane; i < kRows * D; i += kWarp) q[i / D * kPitch<D> + i % D] = i / D < rows ? from[i] : 0;
  u32 room = shared_address(memory) + kQueryBytes<D>, stage = room + kWarpBytes<D, kLow, 0>;
  const Unit u = units[index];
  const Segment &s = segments[u.segment];
  Folded<D> folded;
  folded.words = room + lane * 8, folded.tables = room + kWordBytes<D>;
  folded.template begin<kLow>(rows);
  folded.tell(Lines<D, kLow>(s.steps + D, lane), lane);
  Stager<D, kLow> stager;
  stager.begin(segments, units, index, index + 1);
  for (u32 at = 0; at < u.leaves * kLeaf; at += kStep) {
    stager.copy(stage);
    copies_end_group();
    wait_copies<0>();
    sync_warp();
    if (at == 0) {
      fold<D, kLow>(folded, stage + S::bins_at, s.exponent, shared_address(memory), rows, 0, lane);
      for (u32 group = 0; group < D / 16; group++) {
        u32x2 w = load_shared2(folded.words + 256 * group);
        for (u32 b = 0; b < 4; b++) words[(index * kRows + g) * D + 16 * group + 4 * t + b] = (signed char)(w.x >> 8 * b) * 256 + (signed char)(w.y >> 8 * b);
      }
    }
    int c[4][4] = {};
    products<D, kLow>(c, folded, stage, lane);
    UNROLL for (u32 i = 0; i < 4; i++)
      UNROLL for (u32 e = 0; e < 2; e++) sums[(index * kBins + at + 8 * t + 4 * e + i) * kRows + g] = c[i][e] * 256 + c[i][2 + e];
    sync_warp();
  }
}

KERNEL void BOUNDS(32, 1) probe(const Segment *segments, const Unit *units, const float *q, int *words, int *sums, u64 rows) {
  probe_unit<HEAD_DIM, false>(segments, units, q, words, sums, (u32)rows, shared_memory);
}

KERNEL void BOUNDS(32, 1) probe_low(const Segment *segments, const Unit *units, const float *q, int *words, int *sums, u64 rows) {
  probe_unit<HEAD_DIM, true>(segments, units, q, words, sums, (u32)rows, shared_memory);
}

// probe_scan does so for what scan computes: of candidate BLOCK_X the folded words, [unit][8][lines][16], the sums, and the products of rows and mean keys, in
// channels of which the first plane knows nothing, [unit][4][8].
KERNEL void BOUNDS(32, 1) probe_scan(const Segment *segments, const Unit *units, const float *from, int *words, int *to, int *means, u64 rows) {
  constexpr u32 D = HEAD_DIM, lines = First<D>::lines;
  u32 lane = THREAD, index = BLOCK_X, g = lane / 4, t = lane % 4;
  float *q = (float *)shared_memory;
  for (u32 i = lane; i < kRows * D; i += kWarp) q[i / D * kPitch<D> + i % D] = i / D < (u32)rows ? from[i] : 0;
  sync_warp();
  u32 at = shared_address(shared_memory), room = at + kRows * kPitch<D> * 4;
  const Unit u = units[index];
  const Segment &s = segments[u.segment];
  const First<D> first(s.steps + D);
  u32 pages = u.leaves / (kPage / kLeaf);
  stage<D>(room, s, u, first, lane);
  const Partly<D> part(first, room, s.exponent, at, lane);
  const Whole<D> whole(s, first, room, at, lane);
  UNROLL for (u32 i = 0; i < lines; i++)
    for (u32 b = 0; b < 4; b++)
      words[((index * kRows + g) * lines + i) * 16 + 4 * t + b] = (signed char)(part.words[i].x >> 8 * b) * 256 + (signed char)(part.words[i].y >> 8 * b);
  for (u32 step = 0; step < u.leaves * kLeaf; step += kStep) {
    int c[4][4] = {};
    sums<D>(c, first, part, room + step / kLeaf * Staged<D>::leaf, lane);
    UNROLL for (u32 i = 0; i < 4; i++)
      UNROLL for (u32 e = 0; e < 2; e++) to[(index * kBins + step + 8 * t + 4 * e + i) * kRows + g] = c[i][e] * 256 + c[i][2 + e];
  }
  int x[2];
  whole.products(x, room, pages, lane);
  UNROLL for (u32 e = 0; e < 2; e++)
    if (2 * t + e < pages) means[(index * kPages + 2 * t + e) * kRows + g] = x[e];
}

// sizes writes what the host has to know: of the tables' entries, and of a block's shared memory.
KERNEL void BOUNDS(1, 1) sizes(u32 *to) {
  to[0] = sizeof(Segment), to[1] = sizeof(Unit), to[2] = sizeof(Split), to[6] = sizeof(Choice);
  to[3] = kQueryBytes<HEAD_DIM> + 4 * kWarpBytes<HEAD_DIM, false, 2>;
  to[4] = kQueryBytes<HEAD_DIM> + 4 * kWarpBytes<HEAD_DIM, true, 1>;
  to[5] = kQueryBytes<HEAD_DIM> + 4 * kWarpBytes<HEAD_DIM, true, 2>;
  to[7] = kQueryBytes<HEAD_DIM> + 4 * kGatherBytes<HEAD_DIM, false>;
  to[8] = kQueryBytes<HEAD_DIM> + 4 * kGatherBytes<HEAD_DIM, true>;
}
