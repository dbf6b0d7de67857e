// cvt: widen the source, convert, narrow to the destination.
#include "alu.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "half.h"
#include "lanes.h"
#include "machine.h"

#pragma GCC optimize("O3")

namespace ptx {

static int64_t signExtend(uint64_t x, int bytes) {
    int s = 64 - 8 * bytes;
    return int64_t(x << s) >> s;
}
static uint64_t zeroExtend(uint64_t x, int bytes) { return bytes == 8 ? x : x & ((1ull << 8 * bytes) - 1); }

static uint64_t clampToInt(double x, Type t) {  // x is integral or infinite or NaN
    int bits = 8 * bytesOf(t);
    if (std::isnan(x)) return bits == 64 ? 1ull << 63 : 0;
    if (isSigned(t)) {
        double top = std::ldexp(1.0, bits - 1);
        if (x >= top) return (1ull << (bits - 1)) - 1;
        if (x < -top) return 0 - (1ull << (bits - 1));
        return uint64_t(int64_t(x));
    }
    double top = std::ldexp(1.0, bits);
    return x <= 0 ? 0 : x >= top ? (bits == 64 ? ~0ull : (1ull << bits) - 1) : uint64_t(x);
}
static uint64_t saturate(uint64_t raw, Type from, Type to) {
    int bits = 8 * bytesOf(to);
    __int128 x = isSigned(from) ? __int128(int64_t(raw)) : __int128(raw);
    __int128 top = isSigned(to) ? (__int128(1) << (bits - 1)) - 1 : (__int128(1) << bits) - 1;
    __int128 low = isSigned(to) ? -(__int128(1) << (bits - 1)) : 0;
    return uint64_t(x > top ? top : x < low ? low : x);
}

static void convertLanes(Warp& w, const Inst& I, uint32_t m) {
    Type from = I.type2, to = I.type;
    Round r = Round(I.round);
    uint64_t raw[32];
    double real[32];
    w.widen(I.s[0], raw);
    bool realFrom = isFloat(from), realTo = isFloat(to);
    lanes(m, [&](int i) {
        switch (from) {
            case Type::f16: real[i] = f16ToF32(uint16_t(raw[i])); break;
            case Type::bf16: real[i] = bf16ToF32(uint16_t(raw[i])); break;
            case Type::f32: { float f = bitsAs<float>(uint32_t(raw[i])); real[i] = I.ftz ? flush(f) : f; break; }
            case Type::f64: real[i] = bitsAs<double>(raw[i]); break;
            default: raw[i] = isSigned(from) ? uint64_t(signExtend(raw[i], bytesOf(from))) : zeroExtend(raw[i], bytesOf(from));
        }
    });
    if (realFrom && (I.roundInt || !realTo)) lanes(m, [&](int i) { real[i] = roundInteger(real[i], r); });
    if (realFrom && !realTo) {
        lanes(m, [&](int i) { raw[i] = clampToInt(real[i], to); });
    } else if (!realFrom && realTo) {
        // 64-bit integers to f32 through double would round twice.
        lanes(m, [&](int i) {
            if (to == Type::f32 && r == Round::nearest) real[i] = isSigned(from) ? float(int64_t(raw[i])) : float(raw[i]);
            else real[i] = isSigned(from) ? double(int64_t(raw[i])) : double(raw[i]);
        });
    } else if (!realFrom && I.sat) {
        lanes(m, [&](int i) { raw[i] = saturate(raw[i], from, to); });
    }
    if (realTo) {
        lanes(m, [&](int i) {
            double x = real[i];
            if (I.sat) x = x > 0 ? std::min(x, 1.0) : 0;
            if (I.relu && x < 0) x = 0;
            switch (to) {
                case Type::f16: raw[i] = roundToF16(x, r); break;
                case Type::bf16: raw[i] = roundToBf16(x, r); break;
                case Type::f32: { float f = roundToF32(x, r); raw[i] = bitsAs<uint32_t>(I.ftz ? flush(f) : f); break; }
                default: raw[i] = bitsAs<uint64_t>(x);
            }
        });
    } else {
        int b = bytesOf(to);
        bool s = isSigned(to);
        lanes(m, [&](int i) { raw[i] = s ? uint64_t(signExtend(raw[i], b)) : zeroExtend(raw[i], b); });
    }
    switch (I.d[0].width) {
        case 2: { auto d = w.at<uint16_t>(I.d[0]); lanes(m, [&](int i) { d[i] = uint16_t(raw[i]); }); break; }
        case 4: { auto d = w.at<uint32_t>(I.d[0]); lanes(m, [&](int i) { d[i] = uint32_t(raw[i]); }); break; }
        default: { auto d = w.at<uint64_t>(I.d[0]); lanes(m, [&](int i) { d[i] = raw[i]; }); }
    }
}
void execCvt(Warp& w, const Inst& I, uint32_t m) {
    // The two that kernels are full of.
    if (!I.ftz && !I.sat && !I.relu && I.s[0].width == 4 && I.d[0].width == 4 && I.round == uint8_t(Round::nearest)) {
        if (I.type == Type::f32 && I.type2 == Type::s32) {
            auto d = w.at<float>(I.d[0]);
            auto a = w.at<int32_t>(I.s[0]);
            return lanes(m, [=](int i) { d[i] = float(a[i]); });
        }
    }
    if (I.type == Type::f32 && I.type2 == Type::f16 && !I.ftz && !I.sat && !I.roundInt && I.s[0].width == 2) {
        auto d = w.at<float>(I.d[0]);
        auto a = w.at<uint16_t>(I.s[0]);
        return lanes(m, [=](int i) { d[i] = f16ToF32(a[i]); });
    }
    convertLanes(w, I, m);
}
void execCvtPackFloats(Warp& w, const Inst& I, uint32_t m) {
    uint32_t* d = w.at<uint32_t>(I.d[0]);
    const float *hi = w.at<float>(I.s[0]), *lo = w.at<float>(I.s[1]);
    Round r = Round(I.round);
    auto one = [&](float x) -> uint32_t {
        if (I.relu && x < 0) x = 0;
        if (I.type == Type::bf16x2) return r == Round::nearest ? f32ToBf16(x) : roundToBf16(x, r);
        return r == Round::nearest ? f32ToF16(x) : roundToF16(x, r);
    };
    lanes(m, [&](int i) { d[i] = one(hi[i]) << 16 | one(lo[i]); });
}
void execCvtPackInts(Warp& w, const Inst& I, uint32_t m) {
    uint32_t* d = w.at<uint32_t>(I.d[0]);
    const int32_t *a = w.at<int32_t>(I.s[0]), *b = w.at<int32_t>(I.s[1]);
    const uint32_t* c = w.at<uint32_t>(I.s[I.ns > 2 ? 2 : 0]);
    int bits = 8 * bytesOf(I.type);
    auto one = [&](int32_t x) { return uint32_t(zeroExtend(saturate(uint64_t(int64_t(x)), Type::s32, I.type), bits / 8)); };
    lanes(m, [&](int i) { d[i] = (I.ns > 2 ? c[i] << 16 : 0) | one(a[i]) << bits | one(b[i]); });
}

}  // namespace ptx
