// Matrix instructions. Fragment layouts are those of the PTX ISA, "Matrix Fragments for mma".
#include <algorithm>

#include "half.h"
#include "machine.h"

#pragma GCC optimize("O3")

namespace ptx {
namespace {

// Where element i of a lane's fragment lies. `per` is how many elements a register holds.
struct Place { int row, col; };

// A, of m rows: registers alternate between rows g and g+8, then go on in the next half of k.
Place placeOfA(int lane, int i, int per, int m, int k) {
    int g = lane >> 2, t = lane & 3, reg = i / per, in = i % per;
    if (m == 8) return {g, t * per + in};
    int half = reg >> 1;
    return {g + (reg & 1) * 8, t * per + in + half * k / 2};
}
Place placeOfB(int lane, int i, int per, int k) {
    int g = lane >> 2, t = lane & 3, reg = i / per, in = i % per;
    return {t * per + in + reg * k / 2, g};
}
Place placeOfC(int lane, int i) { return {(lane >> 2) + (i >> 1) * 8, (lane & 3) * 2 + (i & 1)}; }

// Matrices with B transposed, and which elements are undefined.
template <class T, class Sum>
struct Product {
    T a[16][32], b[8][32];
    Sum c[16][8];
    bool badA[16][32], badB[8][32], badC[16][8];
    bool bad = false;
};

template <class T, class Sum, class Get>
void gather(Warp& w, const Inst& I, Product<T, Sum>& p, int per, Get get) {
    const int m = I.vec, k = int(I.imm), bytes = 4 / per;
    const int na = m * k / 32, nb = 8 * k / 32;
    const Ref *ra = I.s, *rb = I.s + na / per;
    p.bad = false;
    for (int r = 0; r < I.ns; r++) p.bad |= w.undefined[I.s[r].reg] != 0;
    if (p.bad) {
        std::memset(p.badA, 0, sizeof p.badA);
        std::memset(p.badB, 0, sizeof p.badB);
    }
    auto undefinedElement = [&](const Ref& r, int lane, int in) {
        return (w.undefinedIn(r, lane) >> in * bytes & ((1 << bytes) - 1)) != 0;
    };
    for (int lane = 0; lane < 32; lane++) {
        for (int i = 0; i < na; i++) {
            Place at = placeOfA(lane, i, per, m, k);
            p.a[at.row][at.col] = get(w.at<uint32_t>(ra[i / per])[lane], i % per, true);
            if (p.bad) p.badA[at.row][at.col] = undefinedElement(ra[i / per], lane, i % per);
        }
        for (int i = 0; i < nb; i++) {
            Place at = placeOfB(lane, i, per, k);
            p.b[at.col][at.row] = get(w.at<uint32_t>(rb[i / per])[lane], i % per, false);
            if (p.bad) p.badB[at.col][at.row] = undefinedElement(rb[i / per], lane, i % per);
        }
    }
}

// What of the result is undefined. Integer zeros hide undefined factors; of floats they do not, for the
// undefined may be a NaN.
template <class T, class Sum>
void spread(Product<T, Sum>& p, int m, int k, bool zerosHide) {
    for (int r = 0; r < m; r++)
        for (int c = 0; c < 8; c++)
            for (int i = 0; i < k; i++) {
                bool a = p.badA[r][i], b = p.badB[c][i];
                if (zerosHide ? (a && (b || p.b[c][i] != 0)) || (b && p.a[r][i] != 0) : a || b) p.badC[r][c] = true;
            }
}

template <class T, class Sum>
void multiply(Product<T, Sum>& p, int m, int k) {
    for (int r = 0; r < m; r++)
        for (int c = 0; c < 8; c++) {
            Sum s = 0;
            for (int i = 0; i < k; i++) s += Sum(p.a[r][i]) * Sum(p.b[c][i]);
            p.c[r][c] += s;
        }
}

void mmaInts(Warp& w, const Inst& I) {
    static thread_local Product<int16_t, int32_t> p;
    const int m = I.vec, k = int(I.imm), nc = m / 4;
    bool sa = I.type == Type::s8, sb = I.type2 == Type::s8;
    gather(w, I, p, 4, [=](uint32_t x, int i, bool isA) {
        uint8_t v = uint8_t(x >> 8 * i);
        return int16_t((isA ? sa : sb) ? int16_t(int8_t(v)) : int16_t(v));
    });
    const Ref* rc = I.s + I.ns - nc;
    auto accumulators = [&](auto f) {
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < nc; i++) f(placeOfC(lane, i), lane, i);
    };
    accumulators([&](Place at, int lane, int i) {
        p.c[at.row][at.col] = I.sat ? 0 : w.at<int32_t>(rc[i])[lane];
        if (p.bad) p.badC[at.row][at.col] = w.undefinedIn(rc[i], lane) != 0;
    });
    if (p.bad) spread(p, m, k, true);
    // Sums wrap: products of 8 bits times 32 never overflow by themselves, so only C can.
    auto bits = reinterpret_cast<Product<int16_t, uint32_t>*>(&p);
    multiply(*bits, m, k);
    int32_t out[4][32];
    accumulators([&](Place at, int lane, int i) {
        int64_t x = p.c[at.row][at.col];
        if (I.sat) x = std::clamp<int64_t>(x + w.at<int32_t>(rc[i])[lane], INT32_MIN, INT32_MAX);
        out[i][lane] = int32_t(x);
    });
    for (int i = 0; i < nc; i++) std::memcpy(w.at<int32_t>(I.d[i]), out[i], 128);
    accumulators([&](Place at, int lane, int i) { w.markUndefined(I.d[i], lane, p.bad && p.badC[at.row][at.col] ? 15 : 0); });
}

void mmaHalves(Warp& w, const Inst& I) {
    static thread_local Product<float, float> p;
    const int m = 16, k = int(I.imm);
    bool bf = I.type == Type::bf16, halfSums = I.mode == 1;
    gather(w, I, p, 2, [=](uint32_t x, int i, bool) {
        uint16_t h = uint16_t(x >> 16 * i);
        return bf ? bf16ToF32(h) : f16ToF32(h);
    });
    const int registers = halfSums ? 2 : 4;
    const Ref* rc = I.s + I.ns - registers;
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {
            Place at = placeOfC(lane, i);
            const Ref& r = rc[halfSums ? i / 2 : i];
            p.c[at.row][at.col] = halfSums ? f16ToF32(uint16_t(w.at<uint32_t>(r)[lane] >> 16 * (i & 1))) : w.at<float>(r)[lane];
            if (p.bad) p.badC[at.row][at.col] = (w.undefinedIn(r, lane) >> (halfSums ? 2 * (i & 1) : 0) & (halfSums ? 3 : 15)) != 0;
        }
    if (p.bad) spread(p, m, k, false);
    multiply(p, m, k);
    for (int lane = 0; lane < 32; lane++) {
        uint8_t bad[4];
        float x[4];
        for (int i = 0; i < 4; i++) {
            Place at = placeOfC(lane, i);
            x[i] = p.c[at.row][at.col];
            bad[i] = p.bad && p.badC[at.row][at.col];
        }
        for (int i = 0; i < registers; i++) {
            if (!halfSums) {
                w.at<float>(I.d[i])[lane] = x[i];
                w.markUndefined(I.d[i], lane, bad[i] ? 15 : 0);
            } else {
                w.at<uint32_t>(I.d[i])[lane] = f32ToF16(x[2 * i]) | uint32_t(f32ToF16(x[2 * i + 1])) << 16;
                w.markUndefined(I.d[i], lane, uint8_t((bad[2 * i] ? 3 : 0) | (bad[2 * i + 1] ? 12 : 0)));
            }
        }
    }
}

}  // namespace

void execMma(Warp& w, const Inst& I, uint32_t) {
    w.block.launch.count.mma++;
    if (I.type == Type::s8 || I.type == Type::u8) mmaInts(w, I);
    else mmaHalves(w, I);
}

// Lane 8j+r names row r of matrix j. Who receives a byte is who reads it.
void execLoadMatrix(Warp& w, const Inst& I, uint32_t m) {
    Block& b = w.block;
    uint32_t used = I.vec == 4 ? m : (1u << 8 * I.vec) - 1;
    w.demandDefined(I.s[0], used, "the address");
    uint64_t at[32];
    w.widen(I.s[0], at);
    for (uint32_t i = 0; i < 32; i++) {
        at[i] += I.offset;
        if (!(used >> i & 1)) continue;
        if (I.s[0].width == 8 && I.space == Space::generic) {
            if (at[i] - sharedWindow >= sharedWindowBytes) throw Fault(invalidAddressSpace, "ldmatrix outside shared memory", int(i));
            at[i] -= sharedWindow;
        }
        at[i] &= 0xffffffffu;
        if (at[i] % 16) throw Fault(misalignedAddress, format("a row at offset %lu of shared memory, not aligned to 16 bytes", at[i]), int(i));
        if (at[i] + 16 > b.shared.size())
            throw Fault(illegalAddress, format("a row at offset %lu of shared memory; the block has %u bytes", at[i], b.shared.size()), int(i));
    }
    uint32_t out[4][32], undefined[4][32];
    for (uint32_t j = 0; j < I.vec; j++)
        for (uint32_t lane = 0; lane < 32; lane++) {
            uint32_t g = lane >> 2, t = lane & 3;
            uint8_t bytes[4];
            if (!I.trans) {
                undefined[j][lane] = b.shared.read(at[8 * j + g] + 4 * t, 4, w.index, lane, bytes);
            } else {
                undefined[j][lane] = b.shared.read(at[8 * j + 2 * t] + 2 * g, 2, w.index, lane, bytes);
                undefined[j][lane] |= b.shared.read(at[8 * j + 2 * t + 1] + 2 * g, 2, w.index, lane, bytes + 2) << 2;
            }
            std::memcpy(&out[j][lane], bytes, 4);
        }
    for (uint32_t j = 0; j < I.vec; j++) {
        std::memcpy(w.at<uint32_t>(I.d[j]), out[j], 128);
        for (uint32_t lane = 0; lane < 32; lane++) w.markUndefined(I.d[j], lane, uint8_t(undefined[j][lane]));
    }
    Counters& c = b.launch.count;
    c.sharedLoad += 128 * I.vec;
    for (uint32_t j = 0; j < I.vec; j++) {  // eight rows of 16 bytes at a time
        uint32_t rows[32] = {}, worst = 1;
        for (uint32_t r = 0; r < 8; r++) {
            uint32_t bank = at[8 * j + r] / 16 & 7, twice = 0;
            for (uint32_t q = 0; q < r; q++) twice |= at[8 * j + q] == at[8 * j + r];
            if (!twice) worst = std::max(worst, ++rows[bank]);
        }
        c.wavefronts += worst;
        c.idealWavefronts++;
    }
}

void execMoveMatrix(Warp& w, const Inst& I, uint32_t) {
    uint32_t in[32], out[32];
    std::memcpy(in, w.at<uint32_t>(I.s[0]), 128);
    uint8_t bad[32] = {};
    auto half = [&](uint32_t row, uint32_t col) { return uint32_t(in[row * 4 + col / 2] >> 16 * (col & 1) & 0xffff); };
    auto badHalf = [&](uint32_t row, uint32_t col) { return uint32_t(w.undefinedIn(I.s[0], row * 4 + col / 2) >> 2 * (col & 1) & 3); };
    for (uint32_t lane = 0; lane < 32; lane++) {
        uint32_t g = lane >> 2, t = 2 * (lane & 3);
        out[lane] = half(t, g) | half(t + 1, g) << 16;
        bad[lane] = uint8_t(badHalf(t, g) | badHalf(t + 1, g) << 2);
    }
    std::memcpy(w.at<uint32_t>(I.d[0]), out, 128);
    for (uint32_t lane = 0; lane < 32; lane++) w.markUndefined(I.d[0], lane, bad[lane]);
}

}  // namespace ptx
