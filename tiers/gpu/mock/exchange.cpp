// Instructions by which lanes of a warp tell each other something.
#include <algorithm>

#include "machine.h"

namespace ptx {

void execShuffle(Warp& w, const Inst& I, uint32_t m) {
    uint32_t value[32], bytes[32];
    const uint32_t* a = w.at<uint32_t>(I.s[0]);
    for (uint32_t i = 0; i < 32; i++) {
        value[i] = a[i];
        bytes[i] = w.undefinedIn(I.s[0], i);
    }
    w.demandDefined(I.s[1], m, "the shuffle's lane");
    w.demandDefined(I.s[2], m, "the shuffle's clamp");
    const uint32_t *lanes = w.at<uint32_t>(I.s[1]), *clamps = w.at<uint32_t>(I.s[2]);
    uint32_t inRange = 0, from[32];
    for (uint32_t r = m; r; r &= r - 1) {
        uint32_t i = __builtin_ctz(r), b = lanes[i] & 31, c = clamps[i] & 31, seg = clamps[i] >> 8 & 31;
        uint32_t most = (i & seg) | (c & ~seg), least = i & seg;
        int j;
        bool ok;
        switch (ShuffleMode(I.mode)) {
            case ShuffleMode::up: j = int(i) - int(b), ok = j >= int(most); break;
            case ShuffleMode::down: j = int(i + b), ok = j <= int(most); break;
            case ShuffleMode::bfly: j = int(i ^ b), ok = j <= int(most); break;
            default: j = int(least | (b & ~seg)), ok = j <= int(most);
        }
        if (!ok) j = int(i);
        if (!(m >> j & 1)) throw Fault(launchFailed, format("shfl from lane %d, which does not take part", j), int(i));
        from[i] = uint32_t(j);
        inRange |= uint32_t(ok) << i;
    }
    uint32_t* d = w.at<uint32_t>(I.d[0]);
    for (uint32_t r = m; r; r &= r - 1) {
        uint32_t i = __builtin_ctz(r);
        d[i] = value[from[i]];
        w.markUndefined(I.d[0], i, uint8_t(bytes[from[i]]));
    }
    if (I.nd > 1) {
        w.setPredicate(I.d[1], m, inRange);
        w.markDefined(I.d[1], m);
    }
}

void execVote(Warp& w, const Inst& I, uint32_t m) {
    w.demandDefined(I.s[0], m, "the vote");
    uint32_t p = w.predicate(I.s[0]) & m;
    switch (VoteMode(I.mode)) {
        case VoteMode::all: w.setPredicate(I.d[0], m, p == m ? ~0u : 0); break;
        case VoteMode::any: w.setPredicate(I.d[0], m, p ? ~0u : 0); break;
        case VoteMode::uni: w.setPredicate(I.d[0], m, p == m || !p ? ~0u : 0); break;
        case VoteMode::ballot:
            for (uint32_t r = m; r; r &= r - 1) w.at<uint32_t>(I.d[0])[__builtin_ctz(r)] = p;
    }
    w.markDefined(I.d[0], m);
}

void execReduce(Warp& w, const Inst& I, uint32_t m) {
    w.demandDefined(I.s[0], m, "the operand of redux");
    const uint32_t* a = w.at<uint32_t>(I.s[0]);
    uint32_t x = a[__builtin_ctz(m)];
    for (uint32_t r = m & (m - 1); r; r &= r - 1) {
        uint32_t y = a[__builtin_ctz(r)];
        bool less = isSigned(I.type) ? int32_t(y) < int32_t(x) : y < x;
        switch (AtomicOp(I.mode)) {
            case AtomicOp::add: x += y; break;
            case AtomicOp::min: x = less ? y : x; break;
            case AtomicOp::max: x = less ? x : y; break;
            case AtomicOp::bitAnd: x &= y; break;
            case AtomicOp::bitOr: x |= y; break;
            default: x ^= y;
        }
    }
    for (uint32_t r = m; r; r &= r - 1) w.at<uint32_t>(I.d[0])[__builtin_ctz(r)] = x;
    w.markDefined(I.d[0], m);
}

void execMatch(Warp& w, const Inst& I, uint32_t m) {
    w.demandDefined(I.s[0], m, "the operand of match");
    uint64_t a[32];
    w.widen(I.s[0], a);
    uint32_t same[32] = {};
    for (uint32_t r = m; r; r &= r - 1)
        for (uint32_t q = m; q; q &= q - 1)
            if (a[__builtin_ctz(r)] == a[__builtin_ctz(q)]) same[__builtin_ctz(r)] |= 1u << __builtin_ctz(q);
    bool all = same[__builtin_ctz(m)] == m;
    for (uint32_t r = m; r; r &= r - 1) {
        uint32_t i = __builtin_ctz(r);
        w.at<uint32_t>(I.d[0])[i] = I.mode ? (all ? m : 0) : same[i];
    }
    w.markDefined(I.d[0], m);
    if (I.nd > 1) {
        w.setPredicate(I.d[1], m, all ? ~0u : 0);
        w.markDefined(I.d[1], m);
    }
}

}  // namespace ptx
