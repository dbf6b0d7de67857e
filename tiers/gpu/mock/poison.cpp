// How undefined bytes travel through instructions. A value that was never written may be moved and
// computed with, as compilers do; it must not decide: no address, no guard, no branch, nothing that
// leaves the device. So only what depends on it is marked, byte by byte.
#include <algorithm>

#include "machine.h"

namespace ptx {
namespace {

uint64_t valueOf(Warp& w, const Ref& r, uint32_t lane) {
    switch (r.width) {
        case 1: return w.predicate(r) >> lane & 1;
        case 2: return w.at<uint16_t>(r)[lane];
        case 4: return w.at<uint32_t>(r)[lane];
        default: return w.at<uint64_t>(r)[lane];
    }
}
uint64_t bitsOfBytes(uint32_t bytes) {
    uint64_t m = 0;
    for (int i = 0; i < 8; i++)
        if (bytes >> i & 1) m |= 0xffull << 8 * i;
    return m;
}
uint8_t bytesOfBits(uint64_t bits) {
    uint8_t m = 0;
    for (int i = 0; i < 8; i++)
        if (bits >> 8 * i & 0xff) m |= uint8_t(1 << i);
    return m;
}
uint8_t upwards(uint8_t bytes) { return bytes ? uint8_t(0xff << __builtin_ctz(bytes)) : 0; }

// The operation with all undefined bits at 0, all at 1, of every operand in turn: bits are independent
// of each other, so a bit that stays the same is defined.
uint8_t logic(Warp& w, const Inst& I, uint32_t lane) {
    uint64_t v[3] = {}, bad[3] = {}, first = 0, changes = 0;
    for (int i = 0; i < I.ns; i++) {
        v[i] = valueOf(w, I.s[i], lane);
        bad[i] = I.s[i].width == 1 ? (w.undefinedIn(I.s[i], lane) ? 1 : 0) : bitsOfBytes(w.undefinedIn(I.s[i], lane));
    }
    for (int k = 0; k < 8; k++) {
        uint64_t x[3], r = 0;
        for (int i = 0; i < 3; i++) x[i] = k >> i & 1 ? v[i] | bad[i] : v[i] & ~bad[i];
        if (I.opcode == "and") r = x[0] & x[1];
        else if (I.opcode == "or") r = x[0] | x[1];
        else if (I.opcode == "lop3") {
            for (int t = 0; t < 8; t++)
                if (I.imm >> t & 1) r |= (t & 4 ? x[0] : ~x[0]) & (t & 2 ? x[1] : ~x[1]) & (t & 1 ? x[2] : ~x[2]);
        } else {
            r = x[0] ^ x[1];  // xor, not, mov
        }
        if (!k) first = r;
        changes |= r ^ first;
    }
    if (I.d[0].width == 1) return changes & 1 ? 1 : 0;
    return bytesOfBits(changes);
}

uint8_t undefinedResult(Warp& w, const Inst& I, uint32_t lane) {
    auto bad = [&](int i) { return w.undefinedIn(I.s[i], lane); };
    auto value = [&](int i) { return valueOf(w, I.s[i], lane); };
    uint8_t any = 0;
    for (int i = 0; i < I.ns; i++) any |= bad(i);
    const uint8_t all = 0xff;
    switch (I.taint) {
        case Taint::logic: return logic(w, I, lane);
        case Taint::carry: return upwards(any);
        case Taint::select: return bad(2) ? all : bad(value(2) ? 0 : 1);
        case Taint::shiftLeft: case Taint::shiftRight: {
            if (bad(1)) return all;
            uint64_t n = value(1), bits = bitsOfBytes(bad(0));
            if (n >= 64) return I.taint == Taint::shiftRight && isSigned(I.type) ? bad(0) : 0;
            if (I.taint == Taint::shiftLeft) return bytesOfBits(bits << n);
            bool sign = isSigned(I.type) && bits >> (8 * I.d[0].width - 1) & 1;
            return sign ? all : bytesOfBits(bits >> n);
        }
        case Taint::permute: {
            if (bad(2) || I.mode) return all;
            uint32_t both = bad(0) | uint32_t(bad(1)) << 4, r = 0;
            for (int k = 0; k < 4; k++) r |= (both >> (value(2) >> 4 * k & 7) & 1) << k;
            return uint8_t(r);
        }
        case Taint::extract: {
            if (bad(1) || bad(2)) return all;
            uint64_t pos = value(1) & 255, len = value(2) & 255;
            if (pos > 63 || !len) return bad(0);
            uint64_t bits = bitsOfBytes(bad(0)) >> pos & (len > 63 ? ~0ull : (1ull << len) - 1);
            return bits && isSigned(I.type) ? all : bytesOfBits(bits);
        }
        case Taint::convert: {
            int n = bytesOf(I.type2);
            uint8_t b = uint8_t(bad(0) & ((1u << n) - 1));
            if (I.sat) return b ? all : 0;
            if (isSigned(I.type2) && b >> (n - 1) & 1) b |= uint8_t(0xff << n);
            return isSigned(I.type) ? upwards(b) : uint8_t(b & ((1u << bytesOf(I.type)) - 1));
        }
        case Taint::halves: return uint8_t((any & 3 ? 3 : 0) | (any & 12 ? 12 : 0));
        default: return any ? all : 0;
    }
}

}  // namespace

void spreadUndefined(Warp& w, const Inst& I, uint32_t m) {
    for (; m; m &= m - 1) {
        uint32_t lane = __builtin_ctz(m);
        if (I.taint == Taint::bytes) {  // sources in a row become destinations in a row
            uint32_t row = 0, at = 0;
            for (int i = 0; i < I.ns; at += I.s[i++].width) row |= uint32_t(w.undefinedIn(I.s[i], lane)) << at;
            for (int i = 0; i < I.nd; i++) {
                w.markUndefined(I.d[i], lane, uint8_t(row & ((1u << I.d[i].width) - 1)));
                row >>= I.d[i].width;
            }
            continue;
        }
        uint8_t u = undefinedResult(w, I, lane);
        for (int i = 0; i < I.nd; i++) w.markUndefined(I.d[i], lane, uint8_t(u & ((1u << I.d[i].width) - 1)));
    }
}

}  // namespace ptx
