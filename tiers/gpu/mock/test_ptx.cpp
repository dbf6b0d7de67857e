// What instructions compute, against plain C++ that shares nothing with the interpreter.
#include <cmath>
#include <limits>
#include <random>

#include "test.h"

namespace {

template <class To, class From>
To as(From x) {
    To y{};
    std::memcpy(&y, &x, std::min(sizeof x, sizeof y));
    return y;
}

// ---- one instruction on many operands ----

struct Case {
    const char* code;  // from r2, r3, r4 (f2.., d2..: the same words as f32, pairs as 64 bits) to d5
    std::function<uint64_t(uint32_t, uint32_t, uint32_t)> want;
    double tolerance = 0;  // relative, of f32 results
};

const uint32_t special[] = {
    0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 33, 63, 64, 255, 256, 0x7f, 0x80, 0xff00, 0x7fff, 0x8000, 0xffff, 0x10000, 0x7fffffff,
    0x80000000, 0x80000001, 0xffffffff, 0xfffffffe, 0x01010101, 0x80808080, 0x12345678, 0x3f800000, 0xbf800000, 0x40490fdb,
    0x7f800000, 0xff800000, 0x7fc00000, 0x00000001, 0x007fffff, 0x3c003c00, 0x7bff7bff, 0x00010001, 0x4b000000, 0x4f000000,
};
constexpr int nSpecial = sizeof special / sizeof *special;

void table(std::vector<Case> cases, bool smallFloats = false) {
    const int n = 4096;
    std::vector<uint32_t> in(3 * n);
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    for (int i = 0; i < 3 * n; i++) in[i] = smallFloats ? as<uint32_t>(normal(random) * 4) : random();
    if (!smallFloats)
        for (int i = 0; i < nSpecial * nSpecial && i < n - 1024; i++) {
            in[3 * i] = special[i % nSpecial];
            in[3 * i + 1] = special[i / nSpecial];
            in[3 * i + 2] = special[(i * 7 + i / nSpecial) % nSpecial];
        }
    for (auto& c : cases) {
        std::string body = "mov.u32 r10, %ctaid.x; mov.u32 r11, %ntid.x; mad.lo.s32 r0, r10, r11, r0;\n"
            "mul.wide.u32 d2, r0, 12; add.s64 d2, d0, d2;\n"
            "ld.global.u32 r2, [d2]; ld.global.u32 r3, [d2+4]; ld.global.u32 r4, [d2+8];\n"
            "mov.b32 f2, r2; mov.b32 f3, r3; mov.b32 f4, r4; cvt.u16.u32 h2, r2; cvt.u16.u32 h3, r3; cvt.u16.u32 h4, r4;\n"
            "mov.b64 d2, {r2, r3}; mov.b64 d3, {r3, r4}; mov.b64 d4, {r4, r2}; setp.ne.u32 p2, r4, 0; mov.u64 d5, 0;\n" +
            std::string(c.code) + "\nmul.wide.u32 d6, r0, 8; add.s64 d6, d1, d6; st.global.u64 [d6], d5;";
        std::vector<uint64_t> out(n);
        CUresult e = launch(kernel(body), in.data(), in.size() * 4, out.data(), out.size() * 8, {32, 128});
        if (e) {
            failTest("", 0, std::string(c.code) + ": result " + std::to_string(e) + (cu.mock_reset ? lastError() : ""));
            if (cu.mock_reset) cu.mock_reset();
            continue;
        }
        for (int i = 0; i < n; i++) {
            uint64_t want = c.want(in[3 * i], in[3 * i + 1], in[3 * i + 2]);
            if (out[i] == want) continue;
            float f = as<float>(uint32_t(out[i])), g = as<float>(uint32_t(want));
            if (c.tolerance < 0 && f != f && g != g) continue;
            if (c.tolerance && ((f != f && g != g) || std::fabs(f - g) <= std::fabs(c.tolerance) * std::fabs(g))) continue;
            char text[300];
            std::snprintf(text, sizeof text, "%s with %08x %08x %08x gave %016lx (%g), not %016lx (%g)", c.code, in[3 * i], in[3 * i + 1],
                in[3 * i + 2], out[i], f, want, g);
            failTest("", 0, text);
            break;
        }
    }
}

using u32 = uint32_t;
using u64 = uint64_t;
using s32 = int32_t;
using s64 = int64_t;
u64 pair(u32 lo, u32 hi) { return u64(hi) << 32 | lo; }
#define F [](u32 a, u32 b, u32 c) -> u64
#define USE (void)a, (void)b, (void)c
#define INT(code, expr) Case{code, F { USE; return expr; }}
#define R32 "; cvt.u64.u32 d5, r5;"
#define F32 "; mov.b32 r5, f5; cvt.u64.u32 d5, r5;"
#define P1 "; selp.u64 d5, 1, 0, p1;"

u64 bits(float x) { return as<u32>(x); }
float fl(u32 x) { return as<float>(x); }

TEST(integers32) {
    table({
        INT("add.s32 r5, r2, r3" R32, a + b),
        INT("sub.s32 r5, r2, r3" R32, a - b),
        INT("mul.lo.s32 r5, r2, r3" R32, a * b),
        INT("mul.hi.u32 r5, r2, r3" R32, u64(a) * b >> 32),
        INT("mul.hi.s32 r5, r2, r3" R32, u32(s64(s32(a)) * s32(b) >> 32)),
        INT("mul.wide.u32 d5, r2, r3;", u64(a) * b),
        INT("mul.wide.s32 d5, r2, r3;", u64(s64(s32(a)) * s32(b))),
        INT("mad.lo.s32 r5, r2, r3, r4" R32, a * b + c),
        INT("mad.hi.u32 r5, r2, r3, r4" R32, u32((u64(a) * b >> 32) + c)),
        INT("mad.wide.s32 d5, r2, r3, d4;", u64(s64(s32(a)) * s32(b)) + pair(c, a)),
        INT("mad.wide.u32 d5, r2, r3, d4;", u64(a) * b + pair(c, a)),
        INT("or.b32 r3, r3, 1; div.u32 r5, r2, r3" R32, a / (b | 1)),
        INT("or.b32 r3, r3, 1; rem.u32 r5, r2, r3" R32, a % (b | 1)),
        INT("or.b32 r3, r3, 1; div.s32 r5, r2, r3" R32, u32(s64(s32(a)) / s32(b | 1))),
        INT("or.b32 r3, r3, 1; rem.s32 r5, r2, r3" R32, u32(s64(s32(a)) % s32(b | 1))),
        INT("min.s32 r5, r2, r3" R32, u32(std::min(s32(a), s32(b)))),
        INT("min.u32 r5, r2, r3" R32, std::min(a, b)),
        INT("max.s32 r5, r2, r3" R32, u32(std::max(s32(a), s32(b)))),
        INT("max.u32 r5, r2, r3" R32, std::max(a, b)),
        INT("abs.s32 r5, r2" R32, s32(a) < 0 ? 0 - a : a),
        INT("neg.s32 r5, r2" R32, 0 - a),
        INT("sad.u32 r5, r2, r3, r4" R32, u32(c + (a > b ? a - b : b - a))),
        INT("add.sat.s32 r5, r2, r3" R32, u32(std::min<s64>(INT32_MAX, std::max<s64>(INT32_MIN, s64(s32(a)) + s32(b))))),
    });
}

TEST(integers64and16) {
    table({
        INT("add.s64 d5, d2, d3;", pair(a, b) + pair(b, c)),
        INT("sub.s64 d5, d2, d3;", pair(a, b) - pair(b, c)),
        INT("mul.lo.s64 d5, d2, d3;", pair(a, b) * pair(b, c)),
        INT("mul.hi.u64 d5, d2, d3;", u64((unsigned __int128)pair(a, b) * pair(b, c) >> 64)),
        INT("mul.hi.s64 d5, d2, d3;", u64((__int128)s64(pair(a, b)) * s64(pair(b, c)) >> 64)),
        INT("mad.lo.s64 d5, d2, d3, d4;", pair(a, b) * pair(b, c) + pair(c, a)),
        INT("or.b64 d3, d3, 1; div.u64 d5, d2, d3;", pair(a, b) / (pair(b, c) | 1)),
        INT("or.b64 d3, d3, 1; rem.u64 d5, d2, d3;", pair(a, b) % (pair(b, c) | 1)),
        INT("min.s64 d5, d2, d3;", u64(std::min(s64(pair(a, b)), s64(pair(b, c))))),
        INT("max.u64 d5, d2, d3;", std::max(pair(a, b), pair(b, c))),
        INT("shl.b64 d5, d2, r4;", c < 64 ? pair(a, b) << c : 0),
        INT("shr.u64 d5, d2, r4;", c < 64 ? pair(a, b) >> c : 0),
        INT("shr.s64 d5, d2, r4;", u64(s64(pair(a, b)) >> std::min(c, 63u))),
        INT("popc.b64 r5, d2" R32, u64(__builtin_popcountll(pair(a, b)))),
        INT("clz.b64 r5, d2" R32, u64(pair(a, b) ? __builtin_clzll(pair(a, b)) : 64)),
        INT("add.s16 h5, h2, h3; cvt.u64.u16 d5, h5;", uint16_t(a + b)),
        INT("mul.lo.s16 h5, h2, h3; cvt.u64.u16 d5, h5;", uint16_t(a * b)),
        INT("mul.wide.s16 r5, h2, h3" R32, u32(int16_t(a) * int16_t(b))),
        INT("mul.wide.u16 r5, h2, h3" R32, u32(uint16_t(a)) * uint16_t(b)),
        INT("mad.lo.s16 h5, h2, h3, h4; cvt.u64.u16 d5, h5;", uint16_t(a * b + c)),
        INT("shr.s16 h5, h2, r4; cvt.u64.u16 d5, h5;", uint16_t(int16_t(a) >> std::min(c, 15u))),
        INT("min.u16 h5, h2, h3; cvt.u64.u16 d5, h5;", std::min(uint16_t(a), uint16_t(b))),
        INT("and.b16 h5, h2, h3; cvt.u64.u16 d5, h5;", uint16_t(a & b)),
    });
}

u32 extract(u32 a, u32 b, u32 c, bool sign) {  // word for word from the PTX ISA
    u32 pos = b & 255, len = c & 255, d = 0;
    u32 sbit = !sign || !len ? 0 : a >> std::min(pos + len - 1, 31u) & 1;
    for (u32 i = 0; i <= 31; i++) d |= (i < len && pos + i <= 31 ? a >> (pos + i) & 1 : sbit) << i;
    return d;
}
u32 insert(u32 a, u32 b, u32 c, u32 d) {
    u32 pos = c & 255, len = d & 255, f = b;
    for (u32 i = 0; i < len && pos + i <= 31; i++) f = (f & ~(1u << (pos + i))) | (a >> i & 1) << (pos + i);
    return f;
}
u32 byteOf(u32 a, u32 b, u32 k) { return k & 4 ? b >> 8 * (k & 3) & 255 : a >> 8 * (k & 3) & 255; }
u32 permuted(u32 a, u32 b, u32 c) {
    u32 r = 0;
    for (int k = 0; k < 4; k++) {
        u32 s = c >> 4 * k & 15, x = byteOf(a, b, s & 7);
        r |= (s & 8 ? (x & 128 ? 255 : 0) : x) << 8 * k;
    }
    return r;
}

TEST(bitOperations) {
    table({
        INT("and.b32 r5, r2, r3" R32, a & b),
        INT("or.b32 r5, r2, r3" R32, a | b),
        INT("xor.b32 r5, r2, r3" R32, a ^ b),
        INT("not.b32 r5, r2" R32, u32(~a)),
        INT("cnot.b32 r5, r2" R32, a == 0),
        INT("shl.b32 r5, r2, r3" R32, b < 32 ? a << b : 0),
        INT("shr.u32 r5, r2, r3" R32, b < 32 ? a >> b : 0),
        INT("shr.s32 r5, r2, r3" R32, u32(s32(a) >> std::min(b, 31u))),
        INT("shf.l.wrap.b32 r5, r2, r3, r4" R32, u32((pair(a, b) << (c & 31)) >> 32)),
        INT("shf.r.wrap.b32 r5, r2, r3, r4" R32, u32(pair(a, b) >> (c & 31))),
        INT("shf.l.clamp.b32 r5, r2, r3, r4" R32, u32((pair(a, b) << std::min(c, 32u)) >> 32)),
        INT("shf.r.clamp.b32 r5, r2, r3, r4" R32, u32(pair(a, b) >> std::min(c, 32u))),
        INT("popc.b32 r5, r2" R32, u64(__builtin_popcount(a))),
        INT("clz.b32 r5, r2" R32, u64(a ? __builtin_clz(a) : 32)),
        INT("bfind.u32 r5, r2" R32, a ? u64(31 - __builtin_clz(a)) : 0xffffffff),
        INT("bfind.s32 r5, r2" R32, (s32(a) < 0 ? ~a : a) ? u64(31 - __builtin_clz(s32(a) < 0 ? ~a : a)) : 0xffffffff),
        INT("brev.b32 r5, r2" R32, [](u32 x) { u32 r = 0; for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i); return u64(r); }(a)),
        INT("and.b32 r3, r3, 63; and.b32 r4, r4, 63; bfe.u32 r5, r2, r3, r4" R32, extract(a, b & 63, c & 63, false)),
        INT("and.b32 r3, r3, 63; and.b32 r4, r4, 63; bfe.s32 r5, r2, r3, r4" R32, extract(a, b & 63, c & 63, true)),
        INT("and.b32 r6, r4, 63; shr.u32 r7, r4, 8; and.b32 r7, r7, 63; bfi.b32 r5, r2, r3, r6, r7" R32, insert(a, b, c & 63, c >> 8 & 63)),
        INT("prmt.b32 r5, r2, r3, r4" R32, permuted(a, b, c & 0xffff)),
        INT("prmt.b32.f4e r5, r2, r3, r4" R32, permuted(a, b, (u32[]){0x3210, 0x4321, 0x5432, 0x6543}[c & 3])),
        INT("prmt.b32.b4e r5, r2, r3, r4" R32, permuted(a, b, (u32[]){0x5670, 0x6701, 0x7012, 0x0123}[c & 3])),
        INT("prmt.b32.rc8 r5, r2, r3, r4" R32, permuted(a, b, 0x1111 * (c & 3))),
        INT("prmt.b32.ecl r5, r2, r3, r4" R32, permuted(a, b, (u32[]){0x3210, 0x3211, 0x3222, 0x3333}[c & 3])),
        INT("prmt.b32.ecr r5, r2, r3, r4" R32, permuted(a, b, (u32[]){0x0000, 0x1110, 0x2210, 0x3210}[c & 3])),
        INT("prmt.b32.rc16 r5, r2, r3, r4" R32, permuted(a, b, (u32[]){0x1010, 0x3232, 0x1010, 0x3232}[c & 3])),
        INT("lop3.b32 r5, r2, r3, r4, 0xea" R32, u32((a & b) | c)),
        INT("lop3.b32 r5, r2, r3, r4, 0x96" R32, u32(a ^ b ^ c)),
        INT("lop3.b32 r5, r2, r3, r4, 0x1d" R32, [](u32 a, u32 b, u32 c) {
            u32 r = 0;
            for (int i = 0; i < 32; i++) r |= (0x1du >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i;
            return u64(r);
        }(a, b, c)),
        INT("selp.b32 r5, r2, r3, p2" R32, c ? a : b),
        INT("selp.b64 d5, d2, d3, p2;", c ? pair(a, b) : pair(b, c)),
        INT("slct.s32.s32 r5, r2, r3, r4" R32, s32(c) >= 0 ? a : b),
        INT("mov.b32 {h5, h6}, r2; mov.b32 r5, {h6, h5}" R32, u32(a << 16 | a >> 16)),
        INT("mov.b64 {r5, r6}, d2; mov.b64 d5, {r6, r5};", pair(b, a)),
        INT("setp.eq.u32 p3, r2, r3; not.pred p4, p3; and.pred p1, p4, p2" P1, a != b && c),
        INT("setp.eq.u32 p3, r2, r3; xor.pred p1, p3, p2" P1, (a == b) != (c != 0)),
        INT("setp.eq.u32 p3, r2, r3; or.pred p1, p3, !p2" P1, a == b || !c),
    });
}

u32 dot4(u32 a, u32 b, u32 c, bool sa, bool sb) {
    for (int k = 0; k < 4; k++) c += u32((sa ? int8_t(a >> 8 * k) : uint8_t(a >> 8 * k)) * (sb ? int8_t(b >> 8 * k) : uint8_t(b >> 8 * k)));
    return c;
}
u32 dot2(u32 a, u32 b, u32 c, bool sa, bool sb, int half) {
    for (int k = 0; k < 2; k++) {
        u32 y = b >> 8 * (k + 2 * half);
        c += u32((sa ? int16_t(a >> 16 * k) : uint16_t(a >> 16 * k)) * (sb ? int8_t(y) : uint8_t(y)));
    }
    return c;
}

TEST(dotProducts) {
    table({
        INT("dp4a.s32.s32 r5, r2, r3, r4" R32, dot4(a, b, c, true, true)),
        INT("dp4a.u32.u32 r5, r2, r3, r4" R32, dot4(a, b, c, false, false)),
        INT("dp4a.s32.u32 r5, r2, r3, r4" R32, dot4(a, b, c, true, false)),
        INT("dp4a.u32.s32 r5, r2, r3, r4" R32, dot4(a, b, c, false, true)),
        INT("dp2a.lo.s32.s32 r5, r2, r3, r4" R32, dot2(a, b, c, true, true, 0)),
        INT("dp2a.hi.u32.s32 r5, r2, r3, r4" R32, dot2(a, b, c, false, true, 1)),
        INT("dp2a.hi.s32.u32 r5, r2, r3, r4" R32, dot2(a, b, c, true, false, 1)),
    });
}

TEST(comparisons) {
    table({
        INT("setp.eq.s32 p1, r2, r3" P1, a == b),
        INT("setp.ne.b32 p1, r2, r3" P1, a != b),
        INT("setp.lt.s32 p1, r2, r3" P1, s32(a) < s32(b)),
        INT("setp.le.s32 p1, r2, r3" P1, s32(a) <= s32(b)),
        INT("setp.gt.u32 p1, r2, r3" P1, a > b),
        INT("setp.ge.s32 p1, r2, r3" P1, s32(a) >= s32(b)),
        INT("setp.lo.u32 p1, r2, r3" P1, a < b),
        INT("setp.ls.u32 p1, r2, r3" P1, a <= b),
        INT("setp.hi.u32 p1, r2, r3" P1, a > b),
        INT("setp.hs.u32 p1, r2, r3" P1, a >= b),
        INT("setp.lt.s64 p1, d2, d3" P1, s64(pair(a, b)) < s64(pair(b, c))),
        INT("setp.gt.u64 p1, d2, d3" P1, pair(a, b) > pair(b, c)),
        INT("setp.lt.s16 p1, h2, h3" P1, int16_t(a) < int16_t(b)),
        INT("setp.lt.and.s32 p1, r2, r3, p2" P1, s32(a) < s32(b) && c),
        INT("setp.lt.or.s32 p1|p3, r2, r3, p2; selp.u64 d5, 2, 0, p3; @p1 add.s64 d5, d5, 1;", (s32(a) < s32(b) || c ? 1 : 0) + (!(s32(a) < s32(b)) || c ? 2 : 0)),
        INT("setp.eq.f32 p1, f2, f3" P1, fl(a) == fl(b)),
        INT("setp.ne.f32 p1, f2, f3" P1, fl(a) < fl(b) || fl(a) > fl(b)),
        INT("setp.lt.f32 p1, f2, f3" P1, fl(a) < fl(b)),
        INT("setp.ge.f32 p1, f2, f3" P1, fl(a) >= fl(b)),
        INT("setp.neu.f32 p1, f2, f3" P1, !(fl(a) == fl(b))),
        INT("setp.ltu.f32 p1, f2, f3" P1, !(fl(a) >= fl(b))),
        INT("setp.gtu.f32 p1, f2, f3" P1, !(fl(a) <= fl(b))),
        INT("setp.num.f32 p1, f2, f3" P1, !std::isnan(fl(a)) && !std::isnan(fl(b))),
        INT("setp.nan.f32 p1, f2, f3" P1, std::isnan(fl(a)) || std::isnan(fl(b))),
        INT("testp.finite.f32 p1, f2" P1, std::isfinite(fl(a))),
    });
}

float minOf(float a, float b) { return a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? a : b) : std::min(a, b); }
float maxOf(float a, float b) { return a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? b : a) : std::max(a, b); }

TEST(floats) {
    double exact = -1;  // bit for bit, but all NaNs are one
    auto G = [&](const char* code, std::function<u64(u32, u32, u32)> f, double tolerance) { return Case{code, std::move(f), tolerance}; };
    auto cases = [&] {
        return std::vector<Case>{
            G("add.f32 f5, f2, f3" F32, F { USE; return bits(fl(a) + fl(b)); }, -1e-30),
            G("sub.rn.f32 f5, f2, f3" F32, F { USE; return bits(fl(a) - fl(b)); }, -1e-30),
            G("mul.f32 f5, f2, f3" F32, F { USE; return bits(fl(a) * fl(b)); }, -1e-30),
            G("fma.rn.f32 f5, f2, f3, f4" F32, F { USE; return bits(std::fma(fl(a), fl(b), fl(c))); }, -1e-30),
            G("div.rn.f32 f5, f2, f3" F32, F { USE; return bits(fl(a) / fl(b)); }, -1e-30),
            G("neg.f32 f5, f2" F32, F { USE; return bits(-fl(a)); }, -1e-30),
            G("abs.f32 f5, f2" F32, F { USE; return bits(std::fabs(fl(a))); }, -1e-30),
            G("min.f32 f5, f2, f3" F32, F { USE; return bits(minOf(fl(a), fl(b))); }, -1e-30),
            G("max.f32 f5, f2, f3" F32, F { USE; return bits(maxOf(fl(a), fl(b))); }, -1e-30),
            G("rcp.rn.f32 f5, f2" F32, F { USE; return bits(1 / fl(a)); }, -1e-30),
            G("sqrt.rn.f32 f5, f2" F32, F { USE; return bits(std::sqrt(fl(a))); }, -1e-30),
            G("copysign.f32 f5, f2, f3" F32, F { USE; return (a & 0x80000000) | (b & 0x7fffffff); }, -1e-30),
        };
    };
    (void)exact;
    table(cases());
    table(cases(), true);
    table({
        G("ex2.approx.f32 f5, f2" F32, F { USE; return bits(std::exp2(fl(a))); }, 4e-7),
        G("ex2.approx.ftz.f32 f5, f2" F32, F { USE; return bits(std::exp2(fl(a))); }, 4e-7),
        G("abs.f32 f2, f2; lg2.approx.f32 f5, f2; add.f32 f5, f5, 0f42000000" F32, F { USE; return bits(std::log2(std::fabs(fl(a))) + 32); }, 1e-6),
        G("rcp.approx.f32 f5, f2" F32, F { USE; return bits(1 / fl(a)); }, 4e-7),
        G("rcp.approx.ftz.f32 f5, f2" F32, F { USE; return bits(1 / fl(a)); }, 4e-7),
        G("abs.f32 f2, f2; rsqrt.approx.f32 f5, f2" F32, F { USE; return bits(1 / std::sqrt(std::fabs(fl(a)))); }, 4e-7),
        G("abs.f32 f2, f2; sqrt.approx.f32 f5, f2" F32, F { USE; return bits(std::sqrt(std::fabs(fl(a)))); }, 4e-7),
        G("div.approx.f32 f5, f2, f3" F32, F { USE; return bits(fl(a) / fl(b)); }, 4e-7),
        G("div.full.f32 f5, f2, f3" F32, F { USE; return bits(fl(a) / fl(b)); }, 4e-7),
        G("tanh.approx.f32 f5, f2; add.f32 f5, f5, 0f41000000" F32, F { USE; return bits(std::tanh(fl(a)) + 8); }, 2e-4),
        G("add.sat.f32 f5, f2, f3" F32, F { USE; return bits(std::min(1.0f, std::max(0.0f, fl(a) + fl(b)))); }, 1e-30),
        G("cvt.f64.f32 g1, f2; cvt.f64.f32 g2, f3; fma.rn.f64 g3, g1, g2, g1; cvt.rn.f32.f64 f5, g3" F32, F { USE; return bits(float(std::fma(double(fl(a)), double(fl(b)), double(fl(a))))); }, 1e-30),
        G("cvt.f64.f32 g1, f2; cvt.f64.f32 g2, f3; div.rn.f64 g3, g1, g2; sub.f64 g3, g3, g1; cvt.rn.f32.f64 f5, g3" F32, F { USE; return bits(float(double(fl(a)) / fl(b) - double(fl(a)))); }, 1e-30),
        // Subnormals vanish with .ftz: 2^-127 times 2, and 2^-126 times a half.
        G("mul.ftz.f32 f5, f2, 0f00000000; mov.b32 f6, 0x00400000; mul.ftz.f32 f6, f6, 0f40000000; mov.b32 f7, 0x00800000; mul.ftz.f32 f7, f7, 0f3f000000; abs.f32 f5, f5; add.f32 f5, f5, f6; add.f32 f5, f5, f7" F32, F { USE; return u64(0); }, 0),
    }, true);
}

// ---- conversions ----

float halfToFloat(uint16_t h) {
    int e = h >> 10 & 31, m = h & 1023;
    float s = h & 0x8000 ? -1.0f : 1.0f;
    if (e == 31) return m ? NAN : s * INFINITY;
    return s * (e ? std::ldexp(float(1024 + m), e - 25) : std::ldexp(float(m), -24));
}
// By search: the nearest of all halves, ties to the even one.
uint16_t floatToHalf(float f) {
    if (f != f) return 0x7fff;
    uint16_t sign = std::signbit(f) ? 0x8000 : 0;
    double x = std::fabs(double(f));
    if (x >= 65520) return sign | 0x7c00;
    int lo = 0, hi = 0x7bff;
    while (lo < hi) {
        int mid = (lo + hi + 1) / 2;
        if (double(halfToFloat(uint16_t(mid))) <= x) lo = mid;
        else hi = mid - 1;
    }
    double below = halfToFloat(uint16_t(lo)), above = lo == 0x7bff ? 65536.0 : double(halfToFloat(uint16_t(lo + 1)));
    bool up = x - below > above - x || (x - below == above - x && (lo & 1));
    return uint16_t(sign | (lo + up));
}
uint16_t floatToBf(float f) {
    if (f != f) return 0x7fff;
    u32 x = as<u32>(f), low = x & 0xffff;
    uint16_t h = uint16_t(x >> 16);
    return uint16_t(h + (low > 0x8000 || (low == 0x8000 && (h & 1))));
}
float bfToFloat(uint16_t h) { return fl(u32(h) << 16); }
s64 clampTo(double x, double lo, double hi) { return s64(x != x ? 0 : std::min(hi, std::max(lo, x))); }

TEST(conversions) {
    table({
        INT("cvt.s64.s32 d5, r2;", u64(s64(s32(a)))),
        INT("cvt.u64.u32 d5, r2;", a),
        INT("cvt.s32.s8 r5, r2" R32, u32(int8_t(a))),
        INT("cvt.u32.u8 r5, r2" R32, uint8_t(a)),
        INT("cvt.u32.u16 r5, h2" R32, uint16_t(a)),
        INT("cvt.s32.s16 r5, h2" R32, u32(int16_t(a))),
        INT("cvt.u16.u32 h5, r2; cvt.u64.u16 d5, h5;", uint16_t(a)),
        INT("cvt.s16.s8 h5, h2; cvt.u64.u16 d5, h5;", uint16_t(int8_t(a))),
        INT("cvt.u32.u64 r5, d2" R32, a),
        INT("cvt.sat.s8.s32 r5, r2; cvt.s64.s32 d5, r5;", u64(s64(std::min(127, std::max(-128, s32(a)))))),
        INT("cvt.sat.u8.s32 r5, r2" R32, u64(std::min(255, std::max(0, s32(a))))),
        INT("cvt.sat.u16.u32 h5, r2; cvt.u64.u16 d5, h5;", std::min(a, 65535u)),
        INT("cvt.pack.sat.u8.s32.b32 r5, r2, r3, r4" R32, u32(c << 16 | u32(std::min(255, std::max(0, s32(a)))) << 8 | u32(std::min(255, std::max(0, s32(b)))))),
        INT("cvt.pack.sat.s16.s32 r5, r2, r3" R32, u32(u32(std::min(32767, std::max(-32768, s32(a)))) << 16 | (u32(std::min(32767, std::max(-32768, s32(b)))) & 0xffff))),
        INT("cvt.rn.f32.s32 f5, r2" F32, bits(float(s32(a)))),
        INT("cvt.rn.f32.u32 f5, r2" F32, bits(float(a))),
        INT("cvt.rz.f32.u32 f5, r2" F32, bits([](u32 x) { float f = float(x); return double(f) > x ? std::nextafter(f, 0.0f) : f; }(a))),
        INT("cvt.rn.f32.s64 f5, d2" F32, bits(float(s64(pair(a, b))))),
        INT("cvt.rn.f32.u64 f5, d2" F32, bits(float(pair(a, b)))),
        INT("cvt.rn.f64.s32 g1, r2; mov.b64 d5, g1;", as<u64>(double(s32(a)))),
        INT("cvt.rn.f64.u64 g1, d2; mov.b64 d5, g1;", as<u64>(double(pair(a, b)))),
        INT("cvt.rzi.s32.f32 r5, f2" R32, u32(clampTo(std::trunc(fl(a)), INT32_MIN, INT32_MAX))),
        INT("cvt.rni.s32.f32 r5, f2" R32, u32(clampTo(std::nearbyint(fl(a)), INT32_MIN, INT32_MAX))),
        INT("cvt.rmi.s32.f32 r5, f2" R32, u32(clampTo(std::floor(fl(a)), INT32_MIN, INT32_MAX))),
        INT("cvt.rpi.s32.f32 r5, f2" R32, u32(clampTo(std::ceil(fl(a)), INT32_MIN, INT32_MAX))),
        INT("cvt.rzi.u32.f32 r5, f2" R32, u32(clampTo(std::trunc(fl(a)), 0, 4294967295.0))),
        Case{"cvt.rni.f32.f32 f5, f2" F32, F { USE; return bits(std::nearbyint(fl(a))); }, -1e-30},
        Case{"cvt.rmi.f32.f32 f5, f2" F32, F { USE; return bits(std::floor(fl(a))); }, -1e-30},
        INT("cvt.rn.f16.f32 h5, f2; cvt.u64.u16 d5, h5;", floatToHalf(fl(a))),
        Case{"cvt.f32.f16 f5, h2" F32, F { USE; return bits(halfToFloat(uint16_t(a))); }, -1e-30},
        INT("cvt.rn.bf16.f32 h5, f2; cvt.u64.u16 d5, h5;", floatToBf(fl(a))),
        INT("cvt.rn.f16x2.f32 r5, f2, f3" R32, u32(floatToHalf(fl(a)) << 16 | floatToHalf(fl(b)))),
        INT("cvt.rn.bf16x2.f32 r5, f2, f3" R32, u32(u32(floatToBf(fl(a))) << 16 | floatToBf(fl(b)))),
        INT("cvt.rn.f16.s32 h5, r2; cvt.u64.u16 d5, h5;", floatToHalf(float(s32(a)))),
        Case{"cvt.rzi.s32.f16 r5, h2" R32, F { USE; return u32(clampTo(std::trunc(halfToFloat(uint16_t(a))), INT32_MIN, INT32_MAX)); }},
    });
    table({
        INT("cvt.rn.f16.f32 h5, f2; cvt.u64.u16 d5, h5;", floatToHalf(fl(a))),
        INT("cvt.rz.f16.f32 h5, f2; cvt.u64.u16 d5, h5;", [](float f) {
            uint16_t h = floatToHalf(f);
            return u64(std::fabs(halfToFloat(h)) > std::fabs(f) ? h - 1 : h);
        }(fl(a))),
        INT("cvt.rni.s32.f32 r5, f2" R32, u32(std::nearbyint(fl(a)))),
        INT("cvt.rmi.s32.f32 r5, f2" R32, u32(s32(std::floor(fl(a))))),
    }, true);
}

bool halfNan(u32 h) { return (h & 0x7fff) > 0x7c00; }
u32 half2(u32 a, u32 b, u32 c, float (*f)(double, double, double)) {
    auto one = [&](int s) { return u32(floatToHalf(f(halfToFloat(uint16_t(a >> s)), halfToFloat(uint16_t(b >> s)), halfToFloat(uint16_t(c >> s))))); };
    return one(0) | one(16) << 16;
}
// The exact result needs at most 53 bits of a double unless the smaller part is below every rounding.
TEST(halves) {
    // Inputs are small numbers, so that no NaN with a payload of its own arises.
#define SMALL "and.b32 r2, r2, 0xbfffbfff; and.b32 r3, r3, 0xbfffbfff; and.b32 r4, r4, 0xbfffbfff; cvt.u16.u32 h2, r2; cvt.u16.u32 h3, r3; cvt.u16.u32 h4, r4; "
#define HALF2(code, expr) Case{SMALL code, F { return half2(a & 0xbfffbfff, b & 0xbfffbfff, c & 0xbfffbfff, [](double x, double y, double z) -> float { (void)x, (void)y, (void)z; return float(expr); }); }}
    table({
        HALF2("add.f16x2 r5, r2, r3" R32, x + y),
        HALF2("sub.rn.f16x2 r5, r2, r3" R32, x - y),
        HALF2("neg.f16x2 r5, r2" R32, -x),
        HALF2("abs.f16x2 r5, r2" R32, std::fabs(x)),
        HALF2("min.f16x2 r5, r2, r3" R32, x == y ? (std::signbit(x) ? x : y) : std::min(x, y)),
        HALF2("max.f16x2 r5, r2, r3" R32, x == y ? (std::signbit(x) ? y : x) : std::max(x, y)),
        Case{SMALL "mul.f16 h5, h2, h3; cvt.u64.u16 d5, h5;", F { USE; return floatToHalf(halfToFloat(uint16_t(a & 0xbfff)) * halfToFloat(uint16_t(b & 0xbfff))); }},
        Case{SMALL "fma.rn.f16 h5, h2, h3, h4; cvt.u64.u16 d5, h5;", F {
            double x = double(halfToFloat(uint16_t(a & 0xbfff))) * halfToFloat(uint16_t(b & 0xbfff)) + halfToFloat(uint16_t(c & 0xbfff));
            float f = float(x);
            // Rounding to odd first keeps the second rounding right.
            if (double(f) != x && !(as<u32>(f) & 1)) f = std::nextafter(f, double(f) < x ? INFINITY : -INFINITY);
            return floatToHalf(f);
        }},
        Case{SMALL "mul.f16x2 r5, r2, r3" R32, F { return half2(a & 0xbfffbfff, b & 0xbfffbfff, c, [](double x, double y, double) { return float(x * y); }); }},
        Case{SMALL "fma.rn.bf16x2 r5, r2, r3, r4" R32, F {
            auto one = [&](int s) {
                double x = double(bfToFloat(uint16_t((a & 0xbfffbfff) >> s))) * bfToFloat(uint16_t((b & 0xbfffbfff) >> s)), z = bfToFloat(uint16_t((c & 0xbfffbfff) >> s));
                double sum = x + z, lost = std::fabs(x) > std::fabs(z) ? z - (sum - x) : x - (sum - z);
                if (lost != 0 && !(as<u64>(sum) & 1)) sum = std::nextafter(sum, lost > 0 ? INFINITY : -INFINITY);
                float f = float(sum);
                if (double(f) != sum && !(as<u32>(f) & 1)) f = std::nextafter(f, double(f) < sum ? INFINITY : -INFINITY);
                return u64(floatToBf(f));
            };
            return one(0) | one(16) << 16;
        }},
        Case{SMALL "setp.lt.f16x2 p1|p3, r2, r3; selp.u64 d5, 2, 0, p3; @p1 add.s64 d5, d5, 1;", F { USE;
            auto h = [](u32 x, int s) { return halfToFloat(uint16_t((x & 0xbfffbfff) >> s)); };
            return u64((h(a, 0) < h(b, 0) ? 1 : 0) + (h(a, 16) < h(b, 16) ? 2 : 0));
        }},
    });
    (void)halfNan;
}

// ---- control flow ----

TEST(divergence) {
    // Collatz: every lane leaves the loop at another time; afterwards all meet in a shuffle.
    std::string body = "add.u32 r2, r0, 1; mov.u32 r3, 0;\n"
        "LOOP: setp.le.u32 p1, r2, 1; @p1 bra DONE;\n"
        "and.b32 r4, r2, 1; setp.eq.u32 p2, r4, 0; @p2 bra EVEN;\n"
        "mad.lo.u32 r2, r2, 3, 1; bra NEXT;\n"
        "EVEN: shr.u32 r2, r2, 1;\n"
        "NEXT: add.u32 r3, r3, 1; bra LOOP;\n"
        "DONE: shfl.sync.bfly.b32 r5, r3, 1, 31, 0xffffffff;\n"
        "mul.wide.u32 d2, r0, 8; add.s64 d2, d1, d2; st.global.v2.u32 [d2], {r3, r5};";
    u32 out[512];
    OK(launch(kernel(body), nullptr, 0, out, sizeof out, {1, 256}));
    auto steps = [](u32 n) {
        u32 k = 0;
        for (; n > 1; k++) n = n & 1 ? 3 * n + 1 : n / 2;
        return k;
    };
    for (u32 t = 0; t < 256; t++) {
        EQUAL(out[2 * t], steps(t + 1));
        EQUAL(out[2 * t + 1], steps((t ^ 1) + 1));
    }
}

TEST(nestedDivergenceAndEarlyExit) {
    std::string body = "setp.ge.u32 p1, r0, 40; @p1 ret;\n"
        "and.b32 r2, r0, 3; setp.eq.u32 p2, r2, 0; setp.eq.u32 p3, r2, 1; mov.u32 r5, 100;\n"
        "@p2 bra A; @p3 bra B; mov.u32 r5, 3; setp.eq.u32 p4, r2, 2; @p4 mov.u32 r5, 2; bra C;\n"
        "B: mov.u32 r5, 1; bra C;\nA: mov.u32 r5, 0;\n"
        "C: { .reg .pred q; setp.eq.u32 q, r5, r2; @!q trap; }\n"
        "{ .reg .pred q; setp.lt.u32 q, r0, 7; @q bra INNER; mov.u32 r6, 5; bra END; INNER: mov.u32 r6, 9; END: }\n"
        "{ .reg .pred q; setp.lt.u32 q, r0, 3; @q bra INNER; add.u32 r6, r6, 1; INNER: }\n"
        "mul.wide.u32 d2, r0, 4; add.s64 d2, d1, d2; st.global.u32 [d2], r6;";
    u32 out[64];
    OK(launch(kernel(body), nullptr, 0, out, sizeof out, {1, 64}));
    for (u32 t = 0; t < 64; t++) EQUAL(out[t], t >= 40 ? 0u : (t < 7 ? 9u : 5u) + (t < 3 ? 0 : 1));
}

TEST(blockBarriersAndSharedMemory) {
    // A reduction over 256 threads by halving, through static shared memory.
    std::string body = "mov.u32 r10, buf; shl.b32 r11, r0, 2; add.u32 r10, r10, r11; mul.lo.u32 r2, r0, r0; st.shared.u32 [r10], r2; mov.u32 r3, 128;\n"
        "LOOP: bar.sync 0; setp.ge.u32 p1, r0, r3; @p1 bra SKIP;\n"
        "shl.b32 r12, r3, 2; add.u32 r12, r12, r10; ld.shared.u32 r4, [r12]; ld.shared.u32 r5, [r10]; add.u32 r5, r5, r4; st.shared.u32 [r10], r5;\n"
        "SKIP: shr.u32 r3, r3, 1; setp.ne.u32 p2, r3, 0; @p2 bra LOOP;\n"
        "setp.ne.u32 p1, r0, 0; @p1 ret; ld.shared.u32 r5, [buf]; st.global.u32 [d1], r5;";
    u32 out[1], sum = 0;
    for (u32 t = 0; t < 256; t++) sum += t * t;
    OK(launch(kernel(body, ".shared .align 4 .b8 buf[1024];"), nullptr, 0, out, sizeof out, {1, 256}));
    EQUAL(out[0], sum);
}

TEST(barrierReductions) {
    std::string body = "setp.lt.u32 p1, r0, 50; setp.lt.u32 p2, r0, 96; bar.red.popc.u32 r2, 0, p1; bar.red.and.pred p3, 0, p1; bar.red.and.pred p4, 0, p2;\n"
        "bar.red.or.pred p5, 0, p1; bar.sync 1, 96; selp.u32 r3, 1, 0, p3; selp.u32 r4, 1, 0, p4; selp.u32 r5, 1, 0, p5;\n"
        "mul.wide.u32 d2, r0, 16; add.s64 d2, d1, d2; st.global.v4.u32 [d2], {r2, r3, r4, r5};";
    u32 out[96 * 4];
    OK(launch(kernel(body), nullptr, 0, out, sizeof out, {1, 96}));
    for (u32 t = 0; t < 96; t++) {
        EQUAL(out[4 * t], 50u);
        EQUAL(out[4 * t + 1], 0u);
        EQUAL(out[4 * t + 2], 1u);
        EQUAL(out[4 * t + 3], 1u);
    }
}

TEST(shuffles) {
    std::string body = "mad.lo.u32 r2, r0, 3, 5; shfl.sync.up.b32 r3|p1, r2, 3, 0, 0xffffffff; shfl.sync.down.b32 r4|p2, r2, 2, 0x0c1f, 0xffffffff;\n"
        "shfl.sync.bfly.b32 r5, r2, 16, 31, 0xffffffff; shfl.sync.idx.b32 r6, r2, 9, 0x181f, 0xffffffff; selp.u32 r7, 1, 0, p1; selp.u32 r8, 2, 0, p2; or.b32 r7, r7, r8;\n"
        "mul.wide.u32 d2, r0, 32; add.s64 d2, d1, d2; st.global.v4.u32 [d2], {r3, r4, r5, r6}; st.global.u32 [d2+16], r7;";
    u32 out[32 * 8];
    OK(launch(kernel(body), nullptr, 0, out, sizeof out));
    for (u32 t = 0; t < 32; t++) {
        auto v = [](u32 lane) { return 3 * lane + 5; };
        // Down within sub-warps: segment mask 0x0c, that is lanes agree in bits 2 and 3; clamp 31.
        u32 most = (t & 0x0c) | (31 & ~0x0cu);
        bool inRange = t + 2 <= most;
        EQUAL(out[8 * t], v(t >= 3 ? t - 3 : t));
        EQUAL(out[8 * t + 1], v(inRange ? t + 2 : t));
        EQUAL(out[8 * t + 2], v(t ^ 16));
        EQUAL(out[8 * t + 3], v((t & 0x18) | (9 & ~0x18u)));
        EQUAL(out[8 * t + 4], (t >= 3 ? 1u : 0) + (inRange ? 2u : 0));
    }
}

TEST(votesAndReductions) {
    std::string body = "setp.lt.u32 p1, r0, 5; vote.sync.ballot.b32 r2, p1, 0xffffffff; vote.sync.any.pred p2, p1, 0xffffffff; vote.sync.all.pred p3, p1, 0xffffffff;\n"
        "vote.sync.uni.pred p4, p2, 0xffffffff; selp.u32 r3, 1, 0, p2; selp.u32 r4, 2, 0, p3; selp.u32 r5, 4, 0, p4; or.b32 r3, r3, r4; or.b32 r3, r3, r5;\n"
        "redux.sync.add.s32 r4, r0, 0xffffffff; sub.s32 r6, 10, r0; redux.sync.min.s32 r5, r6, 0xffffffff; redux.sync.max.u32 r7, r0, 0xffffffff; redux.sync.xor.b32 r8, r0, 0xffffffff; add.u32 r7, r7, r8;\n"
        "and.b32 r9, r0, 3; match.any.sync.b32 r10, r9, 0xffffffff; match.all.sync.b32 r11|p5, r4, 0xffffffff; activemask.b32 r12;\n"
        "@p1 bra FEW; mov.u32 r13, 7; bra MEET; FEW: redux.sync.add.u32 r13, r0, 0x1f; MEET: bar.warp.sync 0xffffffff;\n"
        "mul.wide.u32 d2, r0, 32; add.s64 d2, d1, d2; st.global.v4.u32 [d2], {r2, r3, r4, r5}; st.global.v4.u32 [d2+16], {r7, r10, r11, r13};";
    u32 out[32 * 8];
    OK(launch(kernel(body), nullptr, 0, out, sizeof out));
    for (u32 t = 0; t < 32; t++) {
        EQUAL(out[8 * t], 31u);
        EQUAL(out[8 * t + 1], 5u);
        EQUAL(out[8 * t + 2], 496u);
        EQUAL(out[8 * t + 3], u32(-21));
        EQUAL(out[8 * t + 4], 31u);
        EQUAL(out[8 * t + 5], 0x11111111u << (t & 3));
        EQUAL(out[8 * t + 6], 0xffffffffu);
        EQUAL(out[8 * t + 7], t < 5 ? 10u : 7u);
    }
}

// ---- memory ----

TEST(loadsAndStores) {
    std::string body = "mul.wide.u32 d2, r0, 16; add.s64 d3, d0, d2; add.s64 d4, d1, d2;\n"
        "ld.global.nc.v4.u32 {r2, r3, r4, r5}, [d3]; ld.volatile.global.u32 r6, [d3+4]; setp.ne.u32 p1, r6, r3; @p1 trap;\n"
        "ld.global.L1::no_allocate.L2::128B.v2.b64 {d5, d6}, [d3]; ld.global.cg.s8 r7, [d3+3]; ld.global.u8 r8, [d3+3]; ld.global.s16 r9, [d3+6]; ld.global.v2.u16 {h2, h3}, [d3+8]; ld.global.ca.v2.f32 {f1, f2}, [d3];\n"
        "mov.b64 {r10, r11}, d6; setp.ne.u32 p1, r10, r4; @p1 trap; mov.b32 r12, {h2, h3}; setp.ne.u32 p1, r12, r4; @p1 trap; mov.b32 r13, f2; setp.ne.u32 p1, r13, r3; @p1 trap;\n"
        "sub.s32 r14, r8, r7; st.global.v4.u32 [d4], {r5, r9, r14, r2}; bar.warp.sync 0xffffffff; st.global.u8 [d4+2], r0; st.volatile.global.u16 [d4+6], h3;";
    u32 in[128], out[128];
    std::mt19937 random(3);
    for (auto& x : in) x = random();
    OK(launch(kernel(body), in, sizeof in, out, sizeof out));
    for (u32 t = 0; t < 32; t++) {
        u32* v = in + 4 * t;
        EQUAL(out[4 * t], (v[3] & 0xff00ffff) | t << 16);
        EQUAL(out[4 * t + 1], (u32(int16_t(v[1] >> 16)) & 0xffff) | (v[2] & 0xffff0000));
        EQUAL(out[4 * t + 2], (v[0] >> 24) - u32(int8_t(v[0] >> 24)));
        EQUAL(out[4 * t + 3], v[0]);
    }
}

TEST(moduleVariablesAndGenericAddresses) {
    std::string globals = ".const .align 4 .b8 table[16] = {1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4};\n.global .align 4 .f32 scale[2] = {0f3F800000, 0f40000000};\n"
        ".global .align 4 .u32 counter;\n.extern .shared .align 16 .b8 dyn[];\n.shared .align 8 .b8 fixed[40];\n";
    std::string body = "and.b32 r2, r0, 3; mul.wide.u32 d2, r2, 4; mov.u64 d3, table; add.s64 d3, d3, d2; ld.const.u32 r3, [d3]; ld.const.u32 r4, [table+8];\n"
        "ld.global.f32 f1, [scale+4]; cvt.rzi.u32.f32 r5, f1; atom.global.add.u32 r6, [counter], 1;\n"
        "mov.u64 d4, dyn; cvta.shared.u64 d5, d4; mul.wide.u32 d6, r0, 4; add.s64 d5, d5, d6; st.u32 [d5], r3; ld.u32 r7, [d5]; cvta.to.shared.u64 d7, d5; cvt.u32.u64 r8, d7; ld.shared.u32 r9, [r8]; isspacep.shared p1, d5; @!p1 trap;\n"
        "cvta.global.u64 d8, d1; mul.wide.u32 d6, r0, 16; add.s64 d8, d8, d6; mov.u32 r10, fixed; setp.eq.u32 p2, r10, r8; add.u32 r7, r7, r9; st.v4.u32 [d8], {r3, r4, r5, r7};";
    u32 out[128];
    OK(launch(kernel(body, globals), nullptr, 0, out, sizeof out, {1, 32, 128}));
    for (u32 t = 0; t < 32; t++) {
        EQUAL(out[4 * t], (t & 3) + 1);
        EQUAL(out[4 * t + 1], 3u);
        EQUAL(out[4 * t + 2], 2u);
        EQUAL(out[4 * t + 3], 2 * ((t & 3) + 1));
    }
}

TEST(atomics) {
    std::string body = "mov.u32 r10, s; setp.ne.u32 p1, r0, 0; @p1 bra GO; mov.u32 r2, 0; st.shared.v2.u32 [r10], {r2, r2}; GO: bar.sync 0;\n"
        "atom.shared.add.u32 r3, [r10], 2; red.shared.max.u32 [r10+4], r0; bar.sync 0; ld.shared.v2.u32 {r4, r5}, [r10];\n"
        "red.global.add.u32 [d1], r0; atom.global.max.s32 r6, [d1+4], r0; atom.global.min.s32 r6, [d1+8], -3; red.global.or.b32 [d1+12], 6; atom.global.exch.b32 r7, [d1+16], r4; atom.global.cas.b32 r8, [d1+20], 0, r5;\n"
        "mov.f32 f1, 0f3f000000; atom.global.add.f32 f2, [d1+24], f1; mov.u64 d5, 5; atom.global.add.u64 d6, [d1+32], d5; atom.global.inc.u32 r9, [d1+40], 9; red.global.and.b32 [d1+28], 0; atom.global.xor.b32 r9, [d1+44], 1;";
    u32 out[12];
    OK(launch(kernel(body, ".shared .align 8 .b8 s[8];"), nullptr, 0, out, sizeof out, {3, 64}));
    EQUAL(out[0], 3u * 2016);
    EQUAL(out[1], 63u);
    EQUAL(out[2], u32(-3));
    EQUAL(out[3], 6u);
    EQUAL(out[4], 128u);
    EQUAL(out[5], 63u);
    EQUAL(out[6], as<u32>(96.0f));
    EQUAL(out[8], 5u * 192);
    EQUAL(out[10], 192u % 10);
    EQUAL(out[11], 0u);
}

TEST(grids) {
    std::string body = "mov.u32 r2, %ctaid.x; mov.u32 r3, %ntid.x; mad.lo.u32 r4, r2, r3, r0; mov.u32 r5, %nctaid.x; mov.u32 r6, %laneid; shl.b32 r6, r6, 8; or.b32 r5, r5, r6; mov.u32 r7, %lanemask_lt; popc.b32 r7, r7; shl.b32 r7, r7, 16; or.b32 r5, r5, r7;\n"
        "setp.ge.u32 p1, r4, r1; @p1 ret; mul.wide.u32 d2, r4, 4; add.s64 d2, d1, d2; st.global.u32 [d2], r5;";
    u32 out[200];
    OK(launch(kernel(body, "", ".maxntid 64, 1, 1 .minnctapersm 2"), nullptr, 0, out, sizeof out, {4, 48}, 170));
    for (u32 i = 0; i < 200; i++) {
        u32 lane = i % 48 % 32;
        EQUAL(out[i], i < 170 ? (4 | lane << 8 | lane << 16) : 0u);
    }
}

// ---- matrices ----

// Writes each lane's registers as in the fragment layouts of the PTX ISA, by the formulas printed there.
struct Fragments { std::vector<u32> a, b; };

template <class Get>
void fillRegister(std::vector<u32>& words, int lane, int reg, int regs, int per, Get element) {
    u32 w = 0;
    for (int i = 0; i < per; i++) w |= element(reg * per + i) << 32 / per * i;
    words[lane * regs + reg] = w;
}

void testMma(const char* shape, const char* types, int M, int K, int bytes, std::function<double(u32)> decodeA,
             std::function<double(u32)> decodeB, std::function<u32(std::mt19937&)> draw, bool ints, bool halfSums = false) {
    std::mt19937 random(11);
    std::vector<u32> A(M * K), B(K * 8);
    for (auto& x : A) x = draw(random);
    for (auto& x : B) x = draw(random);
    std::vector<double> C(M * 8);
    for (auto& x : C) x = ints ? double(int(random() % 2000) - 1000) : int(random() % 64) / 8.0 - 4;
    const int per = 4 / bytes, ra = M * K * bytes / 128, rb = 8 * K * bytes / 128, nc = M / 4;
    std::vector<u32> in(32 * 16);  // per lane: a, b, c
    for (int lane = 0; lane < 32; lane++) {
        int g = lane >> 2, t = lane % 4;
        std::vector<u32> w(16);
        for (int i = 0; i < ra * per; i++) {
            int row, col;
            if (bytes == 2) {  // m16n8k8, m16n8k16: .f16, .bf16
                row = i < 2 || (i >= 4 && i < 6) ? g : g + 8;
                col = t * 2 + (i & 1) + (i >= 4 ? 8 : 0);
            } else if (M == 8) {  // m8n8k16
                row = g;
                col = t * 4 + i;
            } else if (K == 16) {  // m16n8k16: .u8, .s8
                row = i < 4 ? g : g + 8;
                col = t * 4 + (i & 3);
            } else {  // m16n8k32
                row = i < 4 || (i >= 8 && i < 12) ? g : g + 8;
                col = t * 4 + (i & 3) + (i < 8 ? 0 : 16);
            }
            w[i / per] |= A[row * K + col] << 8 * bytes * (i % per);
        }
        for (int i = 0; i < rb * per; i++) {
            int row = bytes == 2 ? t * 2 + (i & 1) + (i < 2 ? 0 : 8) : t * 4 + (i & 3) + (i < 4 ? 0 : 16), col = g;
            w[4 + i / per] |= B[row * 8 + col] << 8 * bytes * (i % per);
        }
        for (int i = 0; i < nc; i++) {
            double c = C[(i < 2 ? g : g + 8) * 8 + t * 2 + (i & 1)];
            if (halfSums) w[8 + i / 2] |= u32(floatToHalf(float(c))) << 16 * (i & 1);
            else w[8 + i] = ints ? u32(s32(c)) : as<u32>(float(c));
        }
        std::copy(w.begin(), w.end(), in.begin() + 16 * lane);
    }
    auto list = [](const char* p, int from, int n) {
        std::string s = "{";
        for (int i = 0; i < n; i++) s += std::string(i ? ", " : "") + p + std::to_string(from + i);
        return s + "}";
    };
    int rc = halfSums ? nc / 2 : nc;
    const char* cd = ints || halfSums ? "r" : "f";
    std::string body = "mul.wide.u32 d2, r0, 64; add.s64 d2, d0, d2; ld.global.v4.u32 {r10, r11, r12, r13}, [d2]; ld.global.v2.u32 {r14, r15}, [d2+16];\n"
        "ld.global.v4.u32 {r16, r17, r18, r19}, [d2+32]; mov.b32 f16, r16; mov.b32 f17, r17; mov.b32 f18, r18; mov.b32 f19, r19;\n"
        "mma.sync.aligned." + std::string(shape) + ".row.col" + types + " " + list(cd, 20, rc) + ", " + list("r", 10, ra) + ", " + list("r", 14, rb) + ", " + list(cd, 16, rc) + ";\n";
    if (*cd == 'f') body += "mov.b32 r20, f20; mov.b32 r21, f21; mov.b32 r22, f22; mov.b32 r23, f23;\n";
    body += "mul.wide.u32 d2, r0, 16; add.s64 d2, d1, d2;\n";
    for (int i = 0; i < rc; i++) body += "st.global.u32 [d2+" + std::to_string(4 * i) + "], r" + std::to_string(20 + i) + ";";
    u32 out[128];
    CUresult e = launch(kernel(body), in.data(), in.size() * 4, out, sizeof out);
    EQUAL(e, 0);
    if (e) return;
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < nc; i++) {
            int row = i < 2 ? lane >> 2 : (lane >> 2) + 8, col = (lane & 3) * 2 + (i & 1);
            double want = C[row * 8 + col];
            for (int k = 0; k < K; k++) want += decodeA(A[row * K + k]) * decodeB(B[k * 8 + col]);
            double got = ints ? double(s32(out[lane * 4 + i])) : halfSums ? halfToFloat(uint16_t(out[lane * 4 + i / 2] >> 16 * (i & 1))) : fl(out[lane * 4 + i]);
            if (ints ? got != want : std::fabs(got - want) > (halfSums ? 2e-2 : 1e-4)) {
                failTest("", 0, std::string(shape) + types + ": element " + std::to_string(row) + "," + std::to_string(col) + " is " + std::to_string(got) + ", not " + std::to_string(want));
                return;
            }
        }
}

TEST(mmaIntegers) {
    auto draw = [](std::mt19937& r) { return u32(r() & 255); };
    auto s = [](u32 x) { return double(int8_t(x)); };
    auto u = [](u32 x) { return double(uint8_t(x)); };
    for (auto [shape, M, K] : {std::tuple<const char*, int, int>{"m8n8k16", 8, 16}, {"m16n8k16", 16, 16}, {"m16n8k32", 16, 32}}) {
        testMma(shape, ".s32.s8.s8.s32", M, K, 1, s, s, draw, true);
        testMma(shape, ".s32.u8.u8.s32", M, K, 1, u, u, draw, true);
        testMma(shape, ".s32.u8.s8.s32", M, K, 1, u, s, draw, true);
        testMma(shape, ".s32.s8.u8.s32", M, K, 1, s, u, draw, true);
    }
    testMma("m16n8k32", ".satfinite.s32.s8.s8.s32", 16, 32, 1, s, s, draw, true);
}

TEST(mmaHalves) {
    auto h = [](u32 x) { return double(halfToFloat(uint16_t(x))); };
    auto b = [](u32 x) { return double(bfToFloat(uint16_t(x))); };
    auto drawH = [](std::mt19937& r) { return u32(floatToHalf((int(r() % 512) - 256) / 128.0f)); };
    auto drawB = [](std::mt19937& r) { return u32(floatToBf((int(r() % 512) - 256) / 128.0f)); };
    testMma("m16n8k16", ".f32.f16.f16.f32", 16, 16, 2, h, h, drawH, false);
    testMma("m16n8k8", ".f32.f16.f16.f32", 16, 8, 2, h, h, drawH, false);
    testMma("m16n8k16", ".f32.bf16.bf16.f32", 16, 16, 2, b, b, drawB, false);
    testMma("m16n8k8", ".f32.bf16.bf16.f32", 16, 8, 2, b, b, drawB, false);
    testMma("m16n8k16", ".f16.f16.f16.f16", 16, 16, 2, h, h, drawH, false, true);
    testMma("m16n8k8", ".f16.f16.f16.f16", 16, 8, 2, h, h, drawH, false, true);
}

TEST(ldmatrix) {
    // 32 rows of 8 halves in shared memory, at a stride of 48 bytes; lane i holds row i.
    for (int x : {1, 2, 4})
        for (bool trans : {false, true}) {
            std::string regs = x == 1 ? "{r10}" : x == 2 ? "{r10, r11}" : "{r10, r11, r12, r13}";
            std::string body = "mul.lo.u32 r2, r0, 48; mov.u32 r3, m; add.u32 r3, r3, r2; mul.wide.u32 d2, r0, 16; add.s64 d2, d0, d2; ld.global.v4.u32 {r4, r5, r6, r7}, [d2]; st.shared.v4.u32 [r3], {r4, r5, r6, r7}; bar.warp.sync 0xffffffff;\n"
                "mov.u32 r10, 0; mov.u32 r11, 0; mov.u32 r12, 0; mov.u32 r13, 0; ldmatrix.sync.aligned.m8n8.x" + std::to_string(x) + (trans ? ".trans" : "") + ".shared.b16 " + regs + ", [r3];\n"
                "mul.wide.u32 d2, r0, 16; add.s64 d2, d1, d2; st.global.v4.u32 [d2], {r10, r11, r12, r13};";
            uint16_t in[256];
            for (int i = 0; i < 256; i++) in[i] = uint16_t(i * 257 + 3);
            u32 out[128];
            OK(launch(kernel(body, ".shared .align 16 .b8 m[1536];"), in, sizeof in, out, sizeof out));
            for (int lane = 0; lane < 32; lane++)
                for (int j = 0; j < x; j++) {
                    int r = lane / 4, c = 2 * (lane % 4);
                    auto at = [&](int row, int col) { return u32(in[(8 * j + (trans ? col : row)) * 8 + (trans ? row : col)]); };
                    EQUAL(out[4 * lane + j], at(r, c) | at(r, c + 1) << 16);
                }
        }
}

TEST(movmatrix) {
    std::string body = "mul.wide.u32 d2, r0, 4; add.s64 d3, d0, d2; ld.global.u32 r2, [d3]; movmatrix.sync.aligned.m8n8.trans.b16 r3, r2; add.s64 d3, d1, d2; st.global.u32 [d3], r3;";
    uint16_t in[64], out[64];
    for (int i = 0; i < 64; i++) in[i] = uint16_t(i);
    OK(launch(kernel(body), in, sizeof in, out, sizeof out));
    for (int i = 0; i < 64; i++) EQUAL(out[i], in[i % 8 * 8 + i / 8]);
}

// ---- asynchronous copies ----

TEST(cpAsync) {
    // Three groups; after two waits all is there. The third copy is cut to 4 bytes, the fourth to none.
    std::string body = "mul.lo.u32 r2, r0, 64; mov.u32 r3, buf; add.u32 r3, r3, r2; mul.wide.u32 d2, r0, 64; add.s64 d2, d0, d2;\n"
        "cp.async.cg.shared.global [r3], [d2], 16; cp.async.commit_group; cp.async.ca.shared.global [r3+16], [d2+16], 8; cp.async.ca.shared.global.L2::128B [r3+24], [d2+24], 4; cp.async.ca.shared.global [r3+28], [d2+28], 4; cp.async.commit_group;\n"
        "mov.u32 r4, 4; mov.u32 r5, 0; cp.async.cg.shared.global [r3+32], [d2+32], 16, r4; cp.async.cg.shared.global [r3+48], [d2+48], 16, r5; cp.async.commit_group;\n"
        "cp.async.wait_group 1; ld.shared.v4.u32 {r10, r11, r12, r13}, [r3]; ld.shared.v4.u32 {r14, r15, r16, r17}, [r3+16]; cp.async.wait_all;\n"
        "bar.warp.sync 0xffffffff; xor.b32 r6, r0, 5; mul.lo.u32 r6, r6, 64; mov.u32 r7, buf; add.u32 r7, r7, r6; ld.shared.v4.u32 {r18, r19, r20, r21}, [r7+32]; ld.shared.v4.u32 {r22, r23, r24, r25}, [r7+48];\n"
        "mul.wide.u32 d2, r0, 64; add.s64 d2, d1, d2; st.global.v4.u32 [d2], {r10, r11, r12, r13}; st.global.v4.u32 [d2+16], {r14, r15, r16, r17}; st.global.v4.u32 [d2+32], {r18, r19, r20, r21}; st.global.v4.u32 [d2+48], {r22, r23, r24, r25};";
    u32 in[512], out[512];
    for (u32 i = 0; i < 512; i++) in[i] = i * 77 + 1;
    OK(launch(kernel(body, ".shared .align 16 .b8 buf[2048];"), in, sizeof in, out, sizeof out));
    for (u32 t = 0; t < 32; t++)
        for (u32 i = 0; i < 16; i++) EQUAL(out[16 * t + i], i < 8 ? in[16 * t + i] : i == 8 ? in[16 * (t ^ 5) + 8] : 0u);
}

}  // namespace
