// What the kernels need of CUDA, without its toolkit: clang compiles them to PTX alone (make gpu-kernels).
#pragma once

#define KERNEL extern "C" __attribute__((global))
#define DEVICE static inline __attribute__((device, always_inline))
#define METHOD __attribute__((device, always_inline))
#define SHARED __attribute__((shared))
#define UNROLL _Pragma("unroll")
#define UNROLL4 _Pragma("unroll 4")
#define ROLLED _Pragma("unroll 1")
#define BOUNDS(threads, blocks) __attribute__((launch_bounds(threads, blocks)))

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef u32 u32x2 __attribute__((ext_vector_type(2)));
typedef u32 u32x4 __attribute__((ext_vector_type(4)));
typedef float f32x2 __attribute__((ext_vector_type(2)));
typedef float f32x4 __attribute__((ext_vector_type(4)));

#define THREAD ((u32)__nvvm_read_ptx_sreg_tid_x())
#define BLOCK_X ((u32)__nvvm_read_ptx_sreg_ctaid_x())
#define BLOCK_Y ((u32)__nvvm_read_ptx_sreg_ctaid_y())
#define BLOCKS_Y ((u32)__nvvm_read_ptx_sreg_nctaid_y())
#define BLOCKS_X ((u32)__nvvm_read_ptx_sreg_nctaid_x())

constexpr u32 kWarp = 32;

// Barriers.

DEVICE void sync_warp() { asm volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }
DEVICE void sync_block() { __nvvm_bar_sync(0); }

// Lanes.

DEVICE u32 shuffle(u32 x, u32 lane) {
  u32 r;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, 31, 0xffffffff;" : "=r"(r) : "r"(x), "r"(lane));
  return r;
}
DEVICE float shuffle(float x, u32 lane) { return __builtin_bit_cast(float, shuffle(__builtin_bit_cast(u32, x), lane)); }

DEVICE float shuffle_xor(float x, u32 mask) {
  u32 r;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, 0xffffffff;" : "=r"(r) : "r"(__builtin_bit_cast(u32, x)), "r"(mask));
  return __builtin_bit_cast(float, r);
}
DEVICE u32 shuffle_xor(u32 x, u32 mask) { return __builtin_bit_cast(u32, shuffle_xor(__builtin_bit_cast(float, x), mask)); }

// Sum and maximum over the four lanes of a quad.
DEVICE float quad_sum(float x) { x += shuffle_xor(x, 1); return x + shuffle_xor(x, 2); }
DEVICE float quad_max(float x) {
  x = __builtin_fmaxf(x, shuffle_xor(x, 1));
  return __builtin_fmaxf(x, shuffle_xor(x, 2));
}

DEVICE bool any(bool x) {
  u32 r;
  asm volatile("{ .reg .pred p, q; setp.ne.u32 p, %1, 0; vote.sync.any.pred q, p, 0xffffffff; selp.u32 %0, 1, 0, q; }"
               : "=r"(r) : "r"((u32)x));
  return r != 0;
}

// Which lanes say so, a bit each.
DEVICE u32 ballot(bool x) {
  u32 r;
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; vote.sync.ballot.b32 %0, p, 0xffffffff; }" : "=r"(r) : "r"((u32)x));
  return r;
}

// Bits.

DEVICE u32 rotate_right(u32 x, u32 n) {
  u32 r;
  asm("shf.r.wrap.b32 %0, %1, %1, %2;" : "=r"(r) : "r"(x), "r"(n));
  return r;
}
// x one up, and below it the topmost bit of y.
DEVICE u32 shift_in(u32 x, u32 y) {
  u32 r;
  asm("shf.l.wrap.b32 %0, %1, %2, 1;" : "=r"(r) : "r"(y), "r"(x));
  return r;
}
// Byte i of the result is the byte of (b, a) that nibble i of selector numbers; a has 0 to 3.
DEVICE u32 pick_bytes(u32 a, u32 b, u32 selector) {
  u32 r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}
DEVICE u32 count_ones(u32 x) { return __builtin_popcount(x); }
// Where the bit is that is set with n set ones below it; 32 or more if there is none.
DEVICE u32 nth_one(u32 x, u32 n) {
  ROLLED for (; n > 0 && x != 0; n--) x &= x - 1;
  return x == 0 ? 32 : __builtin_ctz(x);
}
template <typename T> DEVICE T bits(u32 x) { return __builtin_bit_cast(T, x); }
DEVICE u32 bits_of(float x) { return __builtin_bit_cast(u32, x); }

// Numbers. Products that integers are made of must not become part of a fused multiply-add.

DEVICE float mul(float a, float b) {
  float r;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
DEVICE float add(float a, float b) {
  float r;
  asm("add.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
DEVICE float fma(float a, float b, float c) {
  float r;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(r) : "f"(a), "f"(b), "f"(c));
  return r;
}
// a / b, rounded correctly where nothing is near the limits of float32, of b's reciprocal to one unit in the last place.
DEVICE float divide(float a, float b, float reciprocal) {
  float r = fma(fma(-b, reciprocal, 1), reciprocal, reciprocal);
  float q = mul(a, r);
  return fma(fma(-b, q, a), r, q);
}
DEVICE float exp2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
DEVICE float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
DEVICE float log2(float x) {
  float r;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
DEVICE float widen_half(u32 h) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"((u16)h));
  return r;
}
// Two binary16 in one register, the first below.
DEVICE u32 halves(float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DEVICE u32 add_halves(u32 a, u32 b) {
  u32 r;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
DEVICE u32 fma_halves(u32 a, u32 b, u32 c) {
  u32 r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

// Matrix units. Fragments are as the PTX manual has them: with g = lane / 4 and t = lane % 4, register i of A holds row
// g + 8 (i % 2), of B column g; c holds rows g and g + 8, columns 2t and 2t + 1.

// c [16][8] += a [16][32] b [32][8]: signed bytes times unsigned ones.
DEVICE void multiply(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// c [16][8] += a [16][16] b [16][8]: binary16, summed in float32.
DEVICE void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Copies from device memory to shared memory that go on meanwhile.

DEVICE u32 shared_address(const void *p) { return (u32)(size_t)(const __attribute__((address_space(3))) void *)p; }

// 16 bytes, or zeros if there are none to copy.
DEVICE void copy16(u32 to, const u8 *from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
DEVICE void copies_end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all but the newest n groups of this thread's copies.
template <int n> DEVICE void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory"); }

// Loads.

DEVICE u32x4 load_shared4(u32 at) {
  u32x4 r;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "r"(at) : "memory");
  return r;
}
DEVICE u32x2 load_shared2(u32 at) {
  u32x2 r;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(r.x), "=r"(r.y) : "r"(at) : "memory");
  return r;
}
DEVICE u32 load_shared1(u32 at) {
  u32 r;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(r) : "r"(at) : "memory");
  return r;
}
DEVICE u32 load_byte(u32 at) {
  u16 r;
  asm volatile("ld.shared.u8 %0, [%1];" : "=h"(r) : "r"(at) : "memory");
  return r;
}
DEVICE void store_shared4(u32 at, u32x4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
DEVICE void store_shared2(u32 at, u32x2 x) { asm volatile("st.shared.v2.u32 [%0], {%1,%2};" ::"r"(at), "r"(x.x), "r"(x.y) : "memory"); }
DEVICE void store_shared1(u32 at, u32 x) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(x) : "memory"); }
DEVICE void store_byte(u32 at, u8 x) { asm volatile("st.shared.u8 [%0], %1;" ::"r"(at), "h"((u16)x) : "memory"); }
DEVICE void add_shared(u32 *to, u32 x) { asm volatile("red.shared.add.u32 [%0], %1;" ::"r"(shared_address(to)), "r"(x) : "memory"); }
