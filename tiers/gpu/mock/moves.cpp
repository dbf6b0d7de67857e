// Moves, packing, selection, predicates and operations on bytes and bits.
#include "alu.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "lanes.h"
#include "machine.h"

#pragma GCC optimize("O3")

namespace ptx {

// ---- moves ----
void execMov(Warp& w, const Inst& I, uint32_t m) {
    switch (I.d[0].width) {
        case 2: { auto d = w.at<uint16_t>(I.d[0]); auto a = w.at<uint16_t>(I.s[0]); lanes(m, [=](int i) { d[i] = a[i]; }); break; }
        case 4: { auto d = w.at<uint32_t>(I.d[0]); auto a = w.at<uint32_t>(I.s[0]); lanes(m, [=](int i) { d[i] = a[i]; }); break; }
        default: { auto d = w.at<uint64_t>(I.d[0]); auto a = w.at<uint64_t>(I.s[0]); lanes(m, [=](int i) { d[i] = a[i]; }); }
    }
}
void execPack(Warp& w, const Inst& I, uint32_t m) {
    int part = I.s[0].width, whole = I.d[0].width;
    uint8_t r[32][8];
    for (int k = 0; k < I.ns; k++)
        lanes(m, [&](int i) { std::memcpy(r[i] + k * part, w.at<uint8_t>(I.s[k]) + i * part, part); });
    lanes(m, [&](int i) { std::memcpy(w.at<uint8_t>(I.d[0]) + i * whole, r[i], whole); });
}
void execUnpack(Warp& w, const Inst& I, uint32_t m) {
    int part = I.d[0].width, whole = I.s[0].width;
    uint8_t r[32][8];
    lanes(m, [&](int i) { std::memcpy(r[i], w.at<uint8_t>(I.s[0]) + i * whole, whole); });
    for (int k = 0; k < I.nd; k++)
        lanes(m, [&](int i) { std::memcpy(w.at<uint8_t>(I.d[k]) + i * part, r[i] + k * part, part); });
}
template <class T>
static void selectLanes(Warp& w, const Inst& I, uint32_t m) {
    T* d = w.at<T>(I.d[0]);
    const T *a = w.at<T>(I.s[0]), *b = w.at<T>(I.s[1]);
    uint32_t p = w.predicate(I.s[2]);
    lanes(m, [=](int i) { d[i] = p >> i & 1 ? a[i] : b[i]; });
}
void execSelp(Warp& w, const Inst& I, uint32_t m) {
    switch (I.d[0].width) {
        case 2: return selectLanes<uint16_t>(w, I, m);
        case 4: return selectLanes<uint32_t>(w, I, m);
        default: return selectLanes<uint64_t>(w, I, m);
    }
}
void execPredLogic(Warp& w, const Inst& I, uint32_t m) {
    uint32_t a = w.predicate(I.s[0]), b = I.ns > 1 ? w.predicate(I.s[1]) : 0;
    uint32_t r = I.mode == 0 ? a & b : I.mode == 1 ? a | b : I.mode == 2 ? a ^ b : I.mode == 3 ? ~a : a;
    w.setPredicate(I.d[0], m, r);
}

// ---- addresses ----
void execIsShared(Warp& w, const Inst& I, uint32_t m) {
    const uint64_t* a = w.at<uint64_t>(I.s[0]);
    uint32_t r = 0;
    for (int i = 0; i < 32; i++) r |= uint32_t(a[i] - sharedWindow < sharedWindowBytes) << i;
    w.setPredicate(I.d[0], m, I.mode ? r : ~r);
}
void execToShared(Warp& w, const Inst& I, uint32_t m) {
    uint64_t* d = w.at<uint64_t>(I.d[0]);
    const uint64_t* a = w.at<uint64_t>(I.s[0]);
    bool from = I.mode;
    lanes(m, [=](int i) { d[i] = from ? a[i] + sharedWindow : a[i] - sharedWindow; });
}

// ---- bits ----
static uint32_t permute(uint32_t a, uint32_t b, uint32_t sel, int mode) {
    uint64_t v = uint64_t(b) << 32 | a;
    auto byte = [&](uint32_t k) { return uint32_t(v >> 8 * (k & 7) & 255); };
    uint32_t r = 0, s = sel & 3;
    for (uint32_t k = 0; k < 4; k++) {
        uint32_t x;
        switch (mode) {
            case 1: x = byte(s + k); break;                                // f4e
            case 2: x = byte((s - k) & 7); break;                          // b4e
            case 3: x = byte(s); break;                                    // rc8
            case 4: x = byte(std::max(k, s)); break;                       // ecl
            case 5: x = byte(std::min(k, s)); break;                       // ecr
            case 6: x = byte((sel & 1) * 2 + (k & 1)); break;              // rc16
            default: {
                uint32_t n = sel >> 4 * k & 15;
                x = byte(n);
                if (n & 8) x = x & 128 ? 255 : 0;
            }
        }
        r |= x << 8 * k;
    }
    return r;
}
void execPrmt(Warp& w, const Inst& I, uint32_t m) {
    auto d = w.at<uint32_t>(I.d[0]);
    auto a = w.at<uint32_t>(I.s[0]), b = w.at<uint32_t>(I.s[1]), c = w.at<uint32_t>(I.s[2]);
    int mode = I.mode;
    lanes(m, [=](int i) { d[i] = permute(a[i], b[i], c[i], mode); });
}
void execLop3(Warp& w, const Inst& I, uint32_t m) {
    auto d = w.at<uint32_t>(I.d[0]);
    auto a = w.at<uint32_t>(I.s[0]), b = w.at<uint32_t>(I.s[1]), c = w.at<uint32_t>(I.s[2]);
    uint32_t t[8];
    for (int k = 0; k < 8; k++) t[k] = I.imm >> k & 1 ? 0xffffffffu : 0;
    lanes(m, [=](int i) {
        uint32_t x = a[i], y = b[i], z = c[i];
        uint32_t low = (~z & ((~y & t[0]) | (y & t[2]))) | (z & ((~y & t[1]) | (y & t[3])));
        uint32_t high = (~z & ((~y & t[4]) | (y & t[6]))) | (z & ((~y & t[5]) | (y & t[7])));
        d[i] = (~x & low) | (x & high);
    });
}
void execShf(Warp& w, const Inst& I, uint32_t m) {
    auto d = w.at<uint32_t>(I.d[0]);
    auto a = w.at<uint32_t>(I.s[0]), b = w.at<uint32_t>(I.s[1]), c = w.at<uint32_t>(I.s[2]);
    bool right = I.mode & 1, clamp = I.mode & 2;
    lanes(m, [=](int i) {
        uint64_t v = uint64_t(b[i]) << 32 | a[i];
        uint32_t n = clamp ? std::min(c[i], 32u) : c[i] & 31;
        d[i] = uint32_t(right ? v >> n : (v << n) >> 32);
    });
}
void execDot(Warp& w, const Inst& I, uint32_t m) {
    auto d = w.at<uint32_t>(I.d[0]);
    auto a = w.at<uint32_t>(I.s[0]), b = w.at<uint32_t>(I.s[1]), c = w.at<uint32_t>(I.s[2]);
    bool sa = I.type == Type::s32, sb = I.type2 == Type::s32;
    int mode = I.mode;
    lanes(m, [=](int i) {
        uint32_t sum = c[i], x = a[i], y = mode == 2 ? b[i] >> 16 : b[i];
        for (int k = 0; k < (mode ? 2 : 4); k++) {
            int32_t p = mode ? (sa ? int16_t(x >> 16 * k) : uint16_t(x >> 16 * k)) : (sa ? int8_t(x >> 8 * k) : uint8_t(x >> 8 * k));
            int32_t q = sb ? int8_t(y >> 8 * k) : uint8_t(y >> 8 * k);
            sum += uint32_t(p * q);
        }
        d[i] = sum;
    });
}

}  // namespace ptx
