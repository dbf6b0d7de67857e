// Lane-wise arithmetic. Loops run over all 32 lanes when all are active, so that the compiler can
// vectorise them; otherwise only over the active ones.
#include "alu.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "half.h"
#include "lanes.h"
#include "machine.h"

#pragma GCC optimize("O3")

namespace ptx {
namespace {

// Functions of one, two or three operands of type T with a result of type D.
template <class Op, class D, class A>
void unary(Warp& w, const Inst& I, uint32_t m) {
    D* d = w.at<D>(I.d[0]);
    const A* a = w.at<A>(I.s[0]);
    lanes(m, [=](int i) { d[i] = Op::f(a[i]); });
}
template <class Op, class D, class A, class B>
void binary(Warp& w, const Inst& I, uint32_t m) {
    D* d = w.at<D>(I.d[0]);
    const A* a = w.at<A>(I.s[0]);
    const B* b = w.at<B>(I.s[1]);
    lanes(m, [=](int i) { d[i] = Op::f(a[i], b[i]); });
}
template <class Op, class D, class A, class C>
void ternary(Warp& w, const Inst& I, uint32_t m) {
    D* d = w.at<D>(I.d[0]);
    const A *a = w.at<A>(I.s[0]), *b = w.at<A>(I.s[1]);
    const C* c = w.at<C>(I.s[2]);
    lanes(m, [=](int i) { d[i] = Op::f(a[i], b[i], c[i]); });
}

// f32 and f64 with .ftz and .sat.
template <class T>
inline T modified(const Inst& I, T x) {
    if constexpr (std::is_same_v<T, float>)
        if (I.ftz) x = flush(x);
    if (I.sat) x = x > 0 ? std::min(x, T(1)) : T(0);
    return x;
}
template <class Op, class T>
void floatUnary(Warp& w, const Inst& I, uint32_t m) {
    if (!I.ftz && !I.sat) return unary<Op, T, T>(w, I, m);
    T* d = w.at<T>(I.d[0]);
    const T* a = w.at<T>(I.s[0]);
    auto in = [&I](T x) { return I.ftz ? T(flush(float(x))) : x; };
    if constexpr (std::is_same_v<T, double>) lanes(m, [&](int i) { d[i] = modified(I, T(Op::f(a[i]))); });
    else lanes(m, [&](int i) { d[i] = modified(I, T(Op::f(in(a[i])))); });
}
template <class Op, class T>
void floatBinary(Warp& w, const Inst& I, uint32_t m) {
    if (!I.ftz && !I.sat) return binary<Op, T, T, T>(w, I, m);
    T* d = w.at<T>(I.d[0]);
    const T *a = w.at<T>(I.s[0]), *b = w.at<T>(I.s[1]);
    auto in = [&I](T x) { return I.ftz && sizeof(T) == 4 ? T(flush(float(x))) : x; };
    lanes(m, [&](int i) { d[i] = modified(I, T(Op::f(in(a[i]), in(b[i])))); });
}

// A fused multiply-add needs the processor's, or it is a slow library call.
void fmaLanes(float* d, const float* a, const float* b, const float* c) {
#pragma GCC ivdep
    for (int i = 0; i < 32; i++) d[i] = std::fma(a[i], b[i], c[i]);
}
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void fmaLanesFast(float* d, const float* a, const float* b, const float* c) {
#pragma GCC ivdep
    for (int i = 0; i < 32; i++) d[i] = __builtin_fmaf(a[i], b[i], c[i]);
}
const bool haveFma = __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2");
#endif

template <class T>
void floatFma(Warp& w, const Inst& I, uint32_t m) {
    T* d = w.at<T>(I.d[0]);
    const T *a = w.at<T>(I.s[0]), *b = w.at<T>(I.s[1]), *c = w.at<T>(I.s[2]);
    if constexpr (std::is_same_v<T, float>) {
        if (!I.ftz && !I.sat) {
            alignas(64) float r[32];
#if defined(__x86_64__)
            (haveFma ? fmaLanesFast : fmaLanes)(r, a, b, c);
#else
            fmaLanes(r, a, b, c);
#endif
            return lanes(m, [&, d](int i) { d[i] = r[i]; });
        }
    }
    auto in = [&I](T x) { return I.ftz && sizeof(T) == 4 ? T(flush(float(x))) : x; };
    lanes(m, [&](int i) { d[i] = modified(I, T(std::fma(in(a[i]), in(b[i]), in(c[i])))); });
}

// ---- integers ----
template <class T> using U = std::make_unsigned_t<T>;
template <class T> using Twice = std::conditional_t<sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
    std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
        std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>>>;
template <class T> constexpr int bitsOf = 8 * sizeof(T);

#define OP(Name, T, expr, ...) template <class T> struct Name { static inline auto f(__VA_ARGS__) { return expr; } };
OP(Add, T, T(U<T>(a) + U<T>(b)), T a, T b)
OP(Sub, T, T(U<T>(a) - U<T>(b)), T a, T b)
OP(MulLo, T, T(uint64_t(a) * uint64_t(b)), T a, T b)
OP(MulHi, T, T((Twice<T>(a) * Twice<T>(b)) >> bitsOf<T>), T a, T b)
OP(MulWide, T, Twice<T>(Twice<T>(a) * Twice<T>(b)), T a, T b)
OP(MadLo, T, T(uint64_t(a) * uint64_t(b) + uint64_t(c)), T a, T b, T c)
OP(MadHi, T, T(T((Twice<T>(a) * Twice<T>(b)) >> bitsOf<T>) + U<T>(c)), T a, T b, T c)
OP(MadWide, T, Twice<T>(uint64_t(Twice<T>(a) * Twice<T>(b)) + uint64_t(c)), T a, T b, Twice<T> c)
OP(Sad, T, T(U<T>(c) + (a < b ? U<T>(b) - U<T>(a) : U<T>(a) - U<T>(b))), T a, T b, T c)
OP(Min, T, a < b ? a : b, T a, T b)
OP(Max, T, a > b ? a : b, T a, T b)
OP(Neg, T, T(0 - U<T>(a)), T a)
OP(Abs, T, T(a < 0 ? 0 - U<T>(a) : U<T>(a)), T a)
OP(And, T, T(a & b), T a, T b)
OP(Or, T, T(a | b), T a, T b)
OP(Xor, T, T(a ^ b), T a, T b)
OP(Not, T, T(~a), T a)
OP(Cnot, T, T(a == 0), T a)
OP(Shl, T, T(n < bitsOf<T> ? U<T>(U<T>(a) << n) : U<T>(0)), T a, uint32_t n)
OP(Shr, T, T(n < bitsOf<T> ? a >> n : a < 0 ? -1 : 0), T a, uint32_t n)
OP(Popc, T, uint32_t(__builtin_popcountll(U<T>(a))), T a)
OP(Clz, T, uint32_t(a ? __builtin_clzll(U<T>(a)) - (64 - bitsOf<T>) : bitsOf<T>), T a)
OP(Mul24, T, T(uint32_t(uint64_t((int64_t(a) << 40) >> 40) * uint64_t((int64_t(b) << 40) >> 40))), T a, T b)
OP(Mad24, T, T(uint32_t(uint64_t((int64_t(a) << 40) >> 40) * uint64_t((int64_t(b) << 40) >> 40)) + uint32_t(c)), T a, T b, T c)
#undef OP
template <class T> struct Div {
    static T f(T a, T b) {
        if (b == 0) return T(-1);
        if (std::is_signed_v<T> && b == T(-1)) return T(0 - U<T>(a));
        return T(a / b);
    }
};
template <class T> struct Rem {
    static T f(T a, T b) {
        if (b == 0) return a;
        if (std::is_signed_v<T> && b == T(-1)) return 0;
        return T(a % b);
    }
};
template <class T> struct Brev {
    static T f(T a) {
        T r = 0;
        for (int i = 0; i < bitsOf<T>; i++) r = T(r << 1 | (a >> i & 1));
        return r;
    }
};
template <class T> struct Bfind {
    static uint32_t f(T a) {
        U<T> x = U<T>(a < 0 ? ~a : a);
        return x ? 63 - __builtin_clzll(x) : 0xffffffffu;
    }
};
template <class T> struct BfindShift {
    static uint32_t f(T a) {
        uint32_t r = Bfind<T>::f(a);
        return r == 0xffffffffu ? r : bitsOf<T> - 1 - r;
    }
};
template <class T>
void addSat(Warp& w, const Inst& I, uint32_t m) {
    T* d = w.at<T>(I.d[0]);
    const T *a = w.at<T>(I.s[0]), *b = w.at<T>(I.s[1]);
    if (!I.sat) return binary<Add<T>, T, T, T>(w, I, m);
    lanes(m, [=](int i) { d[i] = T(std::clamp<int64_t>(int64_t(a[i]) + b[i], INT32_MIN, INT32_MAX)); });
}
template <class T>
void subSat(Warp& w, const Inst& I, uint32_t m) {
    T* d = w.at<T>(I.d[0]);
    const T *a = w.at<T>(I.s[0]), *b = w.at<T>(I.s[1]);
    if (!I.sat) return binary<Sub<T>, T, T, T>(w, I, m);
    lanes(m, [=](int i) { d[i] = T(std::clamp<int64_t>(int64_t(a[i]) - b[i], INT32_MIN, INT32_MAX)); });
}
template <class T>
void bfe(Warp& w, const Inst& I, uint32_t m) {
    T* d = w.at<T>(I.d[0]);
    const T* a = w.at<T>(I.s[0]);
    const uint32_t *pos = w.at<uint32_t>(I.s[1]), *len = w.at<uint32_t>(I.s[2]);
    lanes(m, [=](int i) {
        int p = pos[i] & 255, n = len[i] & 255, top = bitsOf<T> - 1;
        U<T> x = p > top ? 0 : U<T>(a[i]) >> p;
        bool fill = std::is_signed_v<T> && n && (U<T>(a[i]) >> std::min(p + n - 1, top) & 1);
        int have = std::min(n, std::max(0, top + 1 - p));
        U<T> keep = have > top ? ~U<T>(0) : (U<T>(1) << have) - 1;
        d[i] = T((x & keep) | (fill ? ~keep : 0));
    });
}
template <class T>
void bfi(Warp& w, const Inst& I, uint32_t m) {
    T* d = w.at<T>(I.d[0]);
    const T *a = w.at<T>(I.s[0]), *b = w.at<T>(I.s[1]);
    const uint32_t *pos = w.at<uint32_t>(I.s[2]), *len = w.at<uint32_t>(I.s[3]);
    lanes(m, [=](int i) {
        uint32_t p = pos[i] & 255, n = len[i] & 255;
        T keep = n >= bitsOf<T> ? T(~T(0)) : T((T(1) << n) - 1);
        T field = p >= bitsOf<T> ? T(0) : T(keep << p);
        d[i] = T((b[i] & ~field) | (p >= bitsOf<T> ? T(0) : T(T(a[i] & keep) << p)));
    });
}
template <class T>
void slct(Warp& w, const Inst& I, uint32_t m) {
    T* d = w.at<T>(I.d[0]);
    const T *a = w.at<T>(I.s[0]), *b = w.at<T>(I.s[1]);
    const int32_t* c = w.at<int32_t>(I.s[2]);
    const float* f = w.at<float>(I.s[2]);
    bool isF = I.type2 == Type::f32;
    lanes(m, [=](int i) { d[i] = (isF ? f[i] >= 0 : c[i] >= 0) ? a[i] : b[i]; });
}

// ---- floats ----
#define OP(Name, T, expr, ...) template <class T> struct Name { static inline T f(__VA_ARGS__) { return T(expr); } };
OP(FAdd, T, a + b, T a, T b)
OP(FSub, T, a - b, T a, T b)
OP(FMul, T, a * b, T a, T b)
OP(FDiv, T, a / b, T a, T b)
OP(FNeg, T, -a, T a)
OP(FAbs, T, std::fabs(a), T a)
// minimum and maximum ignore one NaN, and order -0 before +0.
OP(FMin, T, a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? a : b) : a < b ? a : b, T a, T b)
OP(FMax, T, a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? b : a) : a > b ? a : b, T a, T b)
OP(FMinNan, T, a != a || b != b ? T(NAN) : FMin<T>::f(a, b), T a, T b)
OP(FMaxNan, T, a != a || b != b ? T(NAN) : FMax<T>::f(a, b), T a, T b)
OP(Copysign, T, std::copysign(b, a), T a, T b)
OP(Rcp, T, 1 / a, T a)
OP(Sqrt, T, std::sqrt(a), T a)
// Approximations: computed in double, so the result is the correctly rounded one.
OP(Rsqrt, T, 1 / std::sqrt(double(a)), T a)
OP(Ex2, T, std::exp2(a), T a)
OP(Lg2, T, std::log2(double(a)), T a)
OP(Sin, T, std::sin(double(a)), T a)
OP(Cos, T, std::cos(double(a)), T a)
OP(Tanh, T, std::tanh(double(a)), T a)
#undef OP

template <class T, class Test>
void testLanes(Warp& w, const Inst& I, uint32_t m, Test t) {
    const T* a = w.at<T>(I.s[0]);
    uint32_t r = 0;
    for (int i = 0; i < 32; i++) r |= uint32_t(t(a[i])) << i;
    w.setPredicate(I.d[0], m, r);
}
template <class T, int What>
void testp(Warp& w, const Inst& I, uint32_t m) {
    testLanes<T>(w, I, m, [](T x) {
        switch (What) {
            case 0: return std::isfinite(x);
            case 1: return std::isinf(x);
            case 2: return !std::isnan(x);
            case 3: return std::isnan(x);
            case 4: return std::isnormal(x);
            default: return std::fpclassify(x) == FP_SUBNORMAL;
        }
    });
}

// ---- 16-bit floats: exact in double, then rounded once ----
template <bool Bf> inline double fromHalf(uint16_t h) { return Bf ? bf16ToF32(h) : f16ToF32(h); }
template <bool Bf> inline uint16_t toHalf(double x) {
    return Bf ? roundToBf16(x, Round::nearest) : roundToF16(x, Round::nearest);
}
template <bool Bf, int Op>
inline uint16_t halfOp(const Inst& I, uint16_t ha, uint16_t hb, uint16_t hc) {
    if (Op == int(Alu::neg)) return ha ^ 0x8000;
    if (Op == int(Alu::abs)) return ha & 0x7fff;
    double a = fromHalf<Bf>(ha), b = fromHalf<Bf>(hb), c = fromHalf<Bf>(hc), r;
    switch (Alu(Op)) {
        case Alu::add: r = a + b; break;
        case Alu::sub: r = a - b; break;
        case Alu::mulLo: r = a * b; break;
        case Alu::fma: r = std::fma(a, b, c); break;
        case Alu::min: r = FMin<double>::f(a, b); break;
        case Alu::max: r = FMax<double>::f(a, b); break;
        case Alu::minNan: r = FMinNan<double>::f(a, b); break;
        case Alu::maxNan: r = FMaxNan<double>::f(a, b); break;
        case Alu::ex2: r = std::exp2(a); break;
        default: r = std::tanh(a); break;
    }
    if (I.sat) r = r > 0 ? std::min(r, 1.0) : 0;
    if (I.relu && !(r > 0)) r = std::isnan(r) ? r : 0;
    return toHalf<Bf>(r);
}
template <bool Bf, bool Pair, int Op>
void halfLanes(Warp& w, const Inst& I, uint32_t m) {
    const Ref &rb = I.s[I.ns > 1 ? 1 : 0], &rc = I.s[I.ns > 2 ? 2 : 0];
    constexpr int n = Pair ? 2 : 1;
    uint16_t* d = w.at<uint16_t>(I.d[0]);
    const uint16_t *a = w.at<uint16_t>(I.s[0]), *b = w.at<uint16_t>(rb), *c = w.at<uint16_t>(rc);
    for (; m; m &= m - 1)
        for (int k = 0, i = n * __builtin_ctz(m); k < n; k++, i++) d[i] = halfOp<Bf, Op>(I, a[i], b[i], c[i]);
}
template <int Op>
ExecFn halfFn(Type t) {
    switch (t) {
        case Type::f16: return halfLanes<false, false, Op>;
        case Type::f16x2: return halfLanes<false, true, Op>;
        case Type::bf16: return halfLanes<true, false, Op>;
        case Type::bf16x2: return halfLanes<true, true, Op>;
        default: return nullptr;
    }
}
ExecFn halfAlu(Alu op, Type t) {
    switch (op) {
        case Alu::add: return halfFn<int(Alu::add)>(t);
        case Alu::sub: return halfFn<int(Alu::sub)>(t);
        case Alu::mulLo: return halfFn<int(Alu::mulLo)>(t);
        case Alu::fma: return halfFn<int(Alu::fma)>(t);
        case Alu::neg: return halfFn<int(Alu::neg)>(t);
        case Alu::abs: return halfFn<int(Alu::abs)>(t);
        case Alu::min: return halfFn<int(Alu::min)>(t);
        case Alu::max: return halfFn<int(Alu::max)>(t);
        case Alu::minNan: return halfFn<int(Alu::minNan)>(t);
        case Alu::maxNan: return halfFn<int(Alu::maxNan)>(t);
        case Alu::ex2: return halfFn<int(Alu::ex2)>(t);
        case Alu::tanh: return halfFn<int(Alu::tanh)>(t);
        default: return nullptr;
    }
}

template <class T>
ExecFn floatAlu(Alu op) {
    switch (op) {
        case Alu::add: return floatBinary<FAdd<T>, T>;
        case Alu::sub: return floatBinary<FSub<T>, T>;
        case Alu::mulLo: return floatBinary<FMul<T>, T>;
        case Alu::div: return floatBinary<FDiv<T>, T>;
        case Alu::min: return floatBinary<FMin<T>, T>;
        case Alu::max: return floatBinary<FMax<T>, T>;
        case Alu::minNan: return floatBinary<FMinNan<T>, T>;
        case Alu::maxNan: return floatBinary<FMaxNan<T>, T>;
        case Alu::copysign: return floatBinary<Copysign<T>, T>;
        case Alu::fma: return floatFma<T>;
        case Alu::neg: return floatUnary<FNeg<T>, T>;
        case Alu::abs: return floatUnary<FAbs<T>, T>;
        case Alu::rcp: return floatUnary<Rcp<T>, T>;
        case Alu::sqrt: return floatUnary<Sqrt<T>, T>;
        case Alu::rsqrt: return floatUnary<Rsqrt<T>, T>;
        case Alu::slct: return slct<T>;
        case Alu::testFinite: return testp<T, 0>;
        case Alu::testInfinite: return testp<T, 1>;
        case Alu::testNumber: return testp<T, 2>;
        case Alu::testNan: return testp<T, 3>;
        case Alu::testNormal: return testp<T, 4>;
        case Alu::testSubnormal: return testp<T, 5>;
        default: break;
    }
    if (!std::is_same_v<T, float>) return nullptr;
    switch (op) {
        case Alu::ex2: return floatUnary<Ex2<T>, T>;
        case Alu::lg2: return floatUnary<Lg2<T>, T>;
        case Alu::sin: return floatUnary<Sin<T>, T>;
        case Alu::cos: return floatUnary<Cos<T>, T>;
        case Alu::tanh: return floatUnary<Tanh<T>, T>;
        default: return nullptr;
    }
}

template <class T>
ExecFn intAlu(Alu op) {
    switch (op) {
        case Alu::add: if constexpr (std::is_same_v<T, int32_t>) return addSat<T>; else return binary<Add<T>, T, T, T>;
        case Alu::sub: if constexpr (std::is_same_v<T, int32_t>) return subSat<T>; else return binary<Sub<T>, T, T, T>;
        case Alu::mulLo: return binary<MulLo<T>, T, T, T>;
        case Alu::mulHi: return binary<MulHi<T>, T, T, T>;
        case Alu::madLo: return ternary<MadLo<T>, T, T, T>;
        case Alu::madHi: return ternary<MadHi<T>, T, T, T>;
        case Alu::div: return binary<Div<T>, T, T, T>;
        case Alu::rem: return binary<Rem<T>, T, T, T>;
        case Alu::min: return binary<Min<T>, T, T, T>;
        case Alu::max: return binary<Max<T>, T, T, T>;
        case Alu::sad: return ternary<Sad<T>, T, T, T>;
        case Alu::shr: return binary<Shr<T>, T, T, uint32_t>;
        case Alu::slct: return slct<T>;
        case Alu::neg: if (std::is_signed_v<T>) return unary<Neg<T>, T, T>; break;
        case Alu::abs: if (std::is_signed_v<T>) return unary<Abs<T>, T, T>; break;
        case Alu::bfe: if (sizeof(T) >= 4) return bfe<T>; break;
        case Alu::bfind: if (sizeof(T) >= 4) return unary<Bfind<T>, uint32_t, T>; break;
        case Alu::bfindShift: if (sizeof(T) >= 4) return unary<BfindShift<T>, uint32_t, T>; break;
        case Alu::mul24: if (std::is_same_v<T, int32_t>) return binary<Mul24<T>, T, T, T>; break;
        case Alu::mad24: if (std::is_same_v<T, int32_t>) return ternary<Mad24<T>, T, T, T>; break;
        default: break;
    }
    if constexpr (sizeof(T) < 8) {
        if (op == Alu::mulWide) return binary<MulWide<T>, Twice<T>, T, T>;
        if (op == Alu::madWide) return ternary<MadWide<T>, Twice<T>, T, Twice<T>>;
    }
    return nullptr;
}

template <class T>
ExecFn bitAlu(Alu op) {
    switch (op) {
        case Alu::bitAnd: return binary<And<T>, T, T, T>;
        case Alu::bitOr: return binary<Or<T>, T, T, T>;
        case Alu::bitXor: return binary<Xor<T>, T, T, T>;
        case Alu::bitNot: return unary<Not<T>, T, T>;
        case Alu::cnot: return unary<Cnot<T>, T, T>;
        case Alu::shl: return binary<Shl<T>, T, T, uint32_t>;
        case Alu::shr: return binary<Shr<T>, T, T, uint32_t>;
        case Alu::slct: return slct<T>;
        case Alu::popc: if (sizeof(T) >= 4) return unary<Popc<T>, uint32_t, T>; break;
        case Alu::clz: if (sizeof(T) >= 4) return unary<Clz<T>, uint32_t, T>; break;
        case Alu::brev: if (sizeof(T) >= 4) return unary<Brev<T>, T, T>; break;
        case Alu::bfi: if (sizeof(T) >= 4) return bfi<T>; break;
        default: break;
    }
    return nullptr;
}

// ---- comparisons ----
template <class T, int C>
inline bool holds(T a, T b) {
    bool unordered = false;
    if constexpr (std::is_floating_point_v<T>) unordered = a != a || b != b;
    switch (Compare(C)) {
        case Compare::eq: return a == b;
        case Compare::ne: return !unordered && a != b;
        case Compare::lt: return a < b;
        case Compare::le: return a <= b;
        case Compare::gt: return a > b;
        case Compare::ge: return a >= b;
        case Compare::equ: return unordered || a == b;
        case Compare::neu: return unordered || a != b;
        case Compare::ltu: return unordered || a < b;
        case Compare::leu: return unordered || a <= b;
        case Compare::gtu: return unordered || a > b;
        case Compare::geu: return unordered || a >= b;
        case Compare::num: return !unordered;
        default: return unordered;
    }
}
uint32_t combine(Warp& w, const Inst& I, uint32_t r) {
    switch (BoolOp(I.mode)) {
        case BoolOp::bitAnd: return r & w.predicate(I.s[2]);
        case BoolOp::bitOr: return r | w.predicate(I.s[2]);
        case BoolOp::bitXor: return r ^ w.predicate(I.s[2]);
        default: return r;
    }
}
template <class T, int C>
void setp(Warp& w, const Inst& I, uint32_t m) {
    const T *a = w.at<T>(I.s[0]), *b = w.at<T>(I.s[1]);
    uint32_t r = 0;
    if constexpr (std::is_same_v<T, float>) {
        if (I.ftz)
            for (int i = 0; i < 32; i++) r |= uint32_t(holds<T, C>(flush(a[i]), flush(b[i]))) << i;
    }
    if (!I.ftz)
        for (int i = 0; i < 32; i++) r |= uint32_t(holds<T, C>(a[i], b[i])) << i;
    uint32_t no = combine(w, I, ~r);
    w.setPredicate(I.d[0], m, combine(w, I, r));
    if (I.nd > 1) w.setPredicate(I.d[1], m, no);
}
template <bool Bf, bool Pair, int C>
void setpHalf(Warp& w, const Inst& I, uint32_t m) {
    const uint16_t *a = w.at<uint16_t>(I.s[0]), *b = w.at<uint16_t>(I.s[1]);
    uint32_t r[2] = {0, 0};
    for (int i = 0; i < 32; i++)
        for (int k = 0; k <= Pair; k++) {
            int j = Pair ? 2 * i + k : i;
            r[k] |= uint32_t(holds<double, C>(fromHalf<Bf>(a[j]), fromHalf<Bf>(b[j]))) << i;
        }
    uint32_t second = combine(w, I, Pair ? r[1] : ~r[0]);
    w.setPredicate(I.d[0], m, combine(w, I, r[0]));
    if (I.nd > 1) w.setPredicate(I.d[1], m, second);
}
template <int C>
ExecFn setpOf(Type t) {
    constexpr bool orderOnly = C <= int(Compare::ge);
    switch (t) {
        case Type::f32: return setp<float, C>;
        case Type::f64: return setp<double, C>;
        case Type::f16: return setpHalf<false, false, C>;
        case Type::bf16: return setpHalf<true, false, C>;
        case Type::f16x2: return setpHalf<false, true, C>;
        case Type::bf16x2: return setpHalf<true, true, C>;
        default: break;
    }
    if constexpr (orderOnly) {
        switch (t) {
            case Type::u16: case Type::b16: return setp<uint16_t, C>;
            case Type::s16: return setp<int16_t, C>;
            case Type::u32: case Type::b32: return setp<uint32_t, C>;
            case Type::s32: return setp<int32_t, C>;
            case Type::u64: case Type::b64: return setp<uint64_t, C>;
            case Type::s64: return setp<int64_t, C>;
            default: break;
        }
    }
    return nullptr;
}

}  // namespace

ExecFn aluFn(Alu op, Type t) {
    switch (t) {
        case Type::u16: return intAlu<uint16_t>(op);
        case Type::s16: return intAlu<int16_t>(op);
        case Type::u32: return intAlu<uint32_t>(op);
        case Type::s32: return intAlu<int32_t>(op);
        case Type::u64: return intAlu<uint64_t>(op);
        case Type::s64: return intAlu<int64_t>(op);
        case Type::b16: return bitAlu<uint16_t>(op);
        case Type::b32: return bitAlu<uint32_t>(op);
        case Type::b64: return bitAlu<uint64_t>(op);
        case Type::f32: return floatAlu<float>(op);
        case Type::f64: return floatAlu<double>(op);
        default: return halfAlu(op, t);
    }
}

ExecFn setpFn(Compare c, Type t) {
    switch (c) {
        case Compare::eq: return setpOf<int(Compare::eq)>(t);
        case Compare::ne: return setpOf<int(Compare::ne)>(t);
        case Compare::lt: return setpOf<int(Compare::lt)>(t);
        case Compare::le: return setpOf<int(Compare::le)>(t);
        case Compare::gt: return setpOf<int(Compare::gt)>(t);
        case Compare::ge: return setpOf<int(Compare::ge)>(t);
        case Compare::equ: return setpOf<int(Compare::equ)>(t);
        case Compare::neu: return setpOf<int(Compare::neu)>(t);
        case Compare::ltu: return setpOf<int(Compare::ltu)>(t);
        case Compare::leu: return setpOf<int(Compare::leu)>(t);
        case Compare::gtu: return setpOf<int(Compare::gtu)>(t);
        case Compare::geu: return setpOf<int(Compare::geu)>(t);
        case Compare::num: return setpOf<int(Compare::num)>(t);
        default: return setpOf<int(Compare::nan)>(t);
    }
}

}  // namespace ptx
