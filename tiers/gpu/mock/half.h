// Conversions between f16, bf16 and f32 by their bits, and rounding to a narrower format.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace ptx {

template <class To, class From>
inline To bitsAs(From x) {
    static_assert(sizeof(To) == sizeof(From), "bitsAs keeps the size");
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

inline float f16ToF32(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return bitsAs<float>(sign | 0x7f800000u | (rest & 0x3ff) << 13);
    // Scaling by 2^112 moves the exponent's bias, and makes subnormals normal.
    return bitsAs<float>(bitsAs<uint32_t>(bitsAs<float>(rest << 13) * 0x1p112f) | sign);
}

// To nearest, ties to even.
inline uint16_t f32ToF16(float f) {
    uint32_t x = bitsAs<uint32_t>(f), sign = x >> 16 & 0x8000;
    x &= 0x7fffffff;
    if (x > 0x7f800000) return 0x7fff;
    if (x >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (x < 0x38800000) {  // below the smallest normal: adding 0.5 leaves the result in the low bits
        uint32_t y = bitsAs<uint32_t>(bitsAs<float>(x) + 0.5f) - 0x3f000000;
        return uint16_t(sign | y);
    }
    x += 0xfff + (x >> 13 & 1);
    return uint16_t(sign | (x - 0x38000000) >> 13);
}

inline float bf16ToF32(uint16_t h) { return bitsAs<float>(uint32_t(h) << 16); }

inline uint16_t f32ToBf16(float f) {
    uint32_t x = bitsAs<uint32_t>(f);
    if ((x & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return uint16_t((x + 0x7fff + (x >> 16 & 1)) >> 16);
}

enum class Round : uint8_t { nearest, zero, down, up, away };

inline double roundInteger(double x, Round r) {
    switch (r) {
        case Round::zero: return std::trunc(x);
        case Round::down: return std::floor(x);
        case Round::up: return std::ceil(x);
        case Round::away: return std::round(x);
        default: return std::nearbyint(x);
    }
}

// x rounded once to a format of `digits` significant bits whose smallest normal is 2^minExp and
// whose largest finite value is `largest`.
inline double roundTo(double x, int digits, int minExp, double largest, Round r) {
    if (x == 0 || !std::isfinite(x)) return x;
    int e;
    std::frexp(x, &e);  // |x| in [2^(e-1), 2^e)
    int unit = (e - 1 < minExp ? minExp : e - 1) - (digits - 1);
    double y = std::ldexp(roundInteger(std::ldexp(x, -unit), r), unit);
    if (std::fabs(y) <= largest) return y;
    bool inward = r == Round::zero || (r == Round::down && y > 0) || (r == Round::up && y < 0);
    return std::copysign(inward ? largest : INFINITY, y);
}

inline float roundToF32(double x, Round r) {
    return r == Round::nearest ? float(x) : float(roundTo(x, 24, -126, 0x1.fffffep127, r));
}
inline uint16_t roundToF16(double x, Round r) {
    if (std::isnan(x)) return 0x7fff;
    return f32ToF16(float(roundTo(x, 11, -14, 65504, r)));
}
inline uint16_t roundToBf16(double x, Round r) {
    if (std::isnan(x)) return 0x7fff;
    return f32ToBf16(float(roundTo(x, 8, -126, 0x1.fep127, r)));
}

}  // namespace ptx
