// The lane-wise instructions: a function for each operation and type.
#pragma once
#include "ptx.h"

namespace ptx {

enum class Alu : uint8_t {
    add, sub, mulLo, mulHi, mulWide, madLo, madHi, madWide, mul24, mad24, sad, div, rem, min, max, neg, abs,
    bitAnd, bitOr, bitXor, bitNot, cnot, shl, shr, popc, clz, bfind, bfindShift, brev, bfe, bfi,
    fma, rcp, sqrt, rsqrt, ex2, lg2, sin, cos, tanh, copysign,
    minNan, maxNan,
    slct, testFinite, testInfinite, testNumber, testNan, testNormal, testSubnormal,
};

// nullptr where the operation does not exist for the type.
ExecFn aluFn(Alu, Type);

enum class Compare : uint8_t { eq, ne, lt, le, gt, ge, equ, neu, ltu, leu, gtu, geu, num, nan };
ExecFn setpFn(Compare, Type);   // d[0]{|d[1]} = s[0] cmp s[1] {bool s[2]}; Inst::mode is the BoolOp
enum class BoolOp : uint8_t { none, bitAnd, bitOr, bitXor };

// Others, which look at the instruction themselves.
void execMov(Warp&, const Inst&, uint32_t);    // one source, one destination, same width
void execPack(Warp&, const Inst&, uint32_t);   // {a,b} -> d
void execUnpack(Warp&, const Inst&, uint32_t); // a -> {d,e}
void execSelp(Warp&, const Inst&, uint32_t);
void execCvt(Warp&, const Inst&, uint32_t);
void execCvtPackFloats(Warp&, const Inst&, uint32_t);  // cvt.rn.f16x2.f32 d, a, b
void execCvtPackInts(Warp&, const Inst&, uint32_t);    // cvt.pack.sat.u8.s32.b32 d, a, b, c
void execPrmt(Warp&, const Inst&, uint32_t);   // mode: 0 default, 1 f4e ... 6 rc16
void execLop3(Warp&, const Inst&, uint32_t);
void execShf(Warp&, const Inst&, uint32_t);    // mode: 1 right, 2 clamp
void execDot(Warp&, const Inst&, uint32_t);    // dp4a (mode 0), dp2a.lo (1), dp2a.hi (2)
void execPredLogic(Warp&, const Inst&, uint32_t);  // mode: 0 and, 1 or, 2 xor, 3 not, 4 mov
void execIsShared(Warp&, const Inst&, uint32_t);   // isspacep; mode 1: shared, 0: global
void execToShared(Warp&, const Inst&, uint32_t);   // cvta.to.shared; mode 1: cvta.shared

}  // namespace ptx
