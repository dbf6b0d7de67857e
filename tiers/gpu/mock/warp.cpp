// A warp: its lanes run in lockstep while they agree on the way. Where they part, the group that is
// furthest behind runs first, so that groups meet again at the earliest instruction they share.
// Instructions that need several lanes wait for them.
#include <algorithm>

#include "machine.h"

namespace ptx {

static void fill(Warp& w, const Ref& r, uint64_t v) {
    for (uint32_t i = 0; i < 32; i++) {
        if (r.width == 2) w.at<uint16_t>(r)[i] = uint16_t(v);
        else if (r.width == 4) w.at<uint32_t>(r)[i] = uint32_t(v);
        else if (r.width == 8) w.at<uint64_t>(r)[i] = v;
    }
    if (r.width == 1) *w.at<uint32_t>(r) = uint32_t(v);
}

Warp::Warp(Block& b, uint32_t i, uint32_t l)
    : block(b), kernel(b.launch.kernel), index(i), lanes(l), undefined(kernel.registers), unwritten(kernel.registers), undefinedBytes(kernel.registers),
      file(new uint8_t[kernel.registerBytes + 128]) {
    regs = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(file.get()) + 63) / 64 * 64);
    std::memset(regs, 0xa5, kernel.registerBytes);
    for (auto& c : kernel.constants) fill(*this, c.ref, c.value);
}
Warp::~Warp() = default;

static uint32_t special(Special s, const Launch& l, const Dim& id, uint32_t thread, uint32_t warps) {
    const Dim &b = l.config.block, &g = l.config.grid;
    uint32_t lane = thread & 31;
    switch (s) {
        case Special::tidX: return thread % b.x;
        case Special::tidY: return thread / b.x % b.y;
        case Special::tidZ: return thread / b.x / b.y;
        case Special::ntidX: return b.x;
        case Special::ntidY: return b.y;
        case Special::ntidZ: return b.z;
        case Special::ctaidX: return id.x;
        case Special::ctaidY: return id.y;
        case Special::ctaidZ: return id.z;
        case Special::nctaidX: return g.x;
        case Special::nctaidY: return g.y;
        case Special::nctaidZ: return g.z;
        case Special::laneid: return lane;
        case Special::warpid: return thread >> 5;
        case Special::nwarpid: return warps;
        case Special::smid: return id.x % 4;
        case Special::nsmid: return 4;
        case Special::lanemaskEq: return 1u << lane;
        case Special::lanemaskLt: return (1u << lane) - 1;
        case Special::lanemaskLe: return (2u << lane) - 1;
        case Special::lanemaskGt: return ~((2u << lane) - 1);
        case Special::lanemaskGe: return ~((1u << lane) - 1);
        case Special::dynamicShared: return l.config.dynamicShared;
        case Special::totalShared: return l.kernel.sharedBytes + l.config.dynamicShared;
        default: return 1;
    }
}

void Warp::start() {
    std::fill(undefined.begin(), undefined.end(), 0xffffffffu);
    std::fill(unwritten.begin(), unwritten.end(), 0xffffffffu);
    for (auto& c : kernel.constants) undefined[c.ref.reg] = 0;
    for (auto& s : kernel.specials) {
        undefined[s.ref.reg] = 0;
        for (uint32_t i = 0; i < 32; i++) {
            uint32_t v = special(s.which, block.launch, block.id, index * 32 + i, uint32_t(block.warps.size()));
            if (s.ref.width == 8) at<uint64_t>(s.ref)[i] = v;
            else at<uint32_t>(s.ref)[i] = v;
        }
    }
    for (uint32_t i = 0; i < 32; i++) {
        pending[i].clear();
        committed[i] = 0;
    }
    live = lanes;
    groups.assign(1, Group{0, lanes, false});
}

void Warp::widen(const Ref& r, uint64_t out[32]) {
    for (uint32_t i = 0; i < 32; i++) out[i] = r.width == 8 ? at<uint64_t>(r)[i] : r.width == 4 ? at<uint32_t>(r)[i] : at<uint16_t>(r)[i];
}

void Warp::demandDefined(const Ref& r, uint32_t mask, const char* what) {
    uint32_t bad = undefined[r.reg] & mask;
    if (bad && block.launch.config.checkUndefined)
        throw Fault(launchFailed, std::string(what) + " depends on a value that was never written", __builtin_ctz(bad));
}

static std::string laneList(uint32_t m) { return format(__builtin_popcount(m) == 1 ? "lane %d" : "lanes 0x%08x", __builtin_popcount(m) == 1 ? __builtin_ctz(m) : int(m)); }

// Groups at the same instruction become one. Then the runnable group that is furthest behind.
size_t Warp::pick() {
    for (size_t i = 0; i < groups.size(); i++)
        for (size_t j = groups.size() - 1; j > i; j--)
            if (groups[j].pc == groups[i].pc) {
                groups[i].mask |= groups[j].mask;
                groups[i].parked = false;
                groups.erase(groups.begin() + j);
            }
    size_t best = groups.size();
    for (size_t i = 0; i < groups.size(); i++)
        if (!groups[i].parked && (best == groups.size() || groups[i].pc < groups[best].pc)) best = i;
    if (best == groups.size()) stuck();
    return best;
}

void Warp::stuck() {
    std::string s = format("divergence: lanes of warp %u wait for each other at different instructions:", index);
    for (auto& g : groups)
        s += "\n    " + laneList(g.mask) + format(" at line %d: ", kernel.code[g.pc].line) + kernel.code[g.pc].text;
    if (live != lanes) s += "\n    " + laneList(lanes & ~live) + " left the kernel";
    current = &kernel.code[groups[0].pc];
    throw Fault(launchFailed, s, __builtin_ctz(groups[0].mask));
}

// Which register tells an instruction's members; nullptr if it needs all lanes that live.
static const Ref* memberMask(const Inst& I) {
    switch (I.kind) {
        case Kind::warpBarrier: return &I.s[0];
        case Kind::shuffle: return &I.s[3];
        case Kind::vote: case Kind::reduce: case Kind::match: return &I.s[1];
        default: return nullptr;
    }
}

// The lanes of m that can execute the instruction now, all members being there. Lanes with different
// member masks execute it one set after the other.
uint32_t Warp::executeTogether(const Inst& I, uint32_t m) {
    const Ref* mask = memberMask(I);
    if (!mask) {
        if (I.kind != Kind::blockBarrier && live != 0xffffffffu)
            throw Fault(launchFailed, I.opcode + " needs all 32 lanes of the warp", __builtin_ctz(m));
        if (live & ~m) return 0;
        if (I.kind != Kind::blockBarrier) synchronised(I, m);
        return m;
    }
    demandDefined(*mask, m, "the member mask");
    uint32_t v[32], ready = 0;
    std::memcpy(v, at<uint32_t>(*mask), sizeof v);
    for (uint32_t rest = m; rest;) {
        uint32_t first = __builtin_ctz(rest), want = v[first], set = 0;
        for (uint32_t r = rest; r; r &= r - 1)
            if (v[__builtin_ctz(r)] == want) set |= 1u << __builtin_ctz(r);
        rest &= ~set;
        if (set & ~want) throw Fault(launchFailed, format("member mask 0x%08x lacks the lane that executes", want), __builtin_ctz(set & ~want));
        if (want & m & ~set)
            throw Fault(launchFailed, format("member mask 0x%08x names %s, which has another", want, laneList(want & m & ~set).c_str()), int(first));
        if (want & ~live & lanes)
            throw Fault(launchFailed, format("member mask 0x%08x names %s, which left the kernel", want, laneList(want & ~live & lanes).c_str()), int(first));
        if (want & ~lanes && want != 0xffffffffu)
            throw Fault(launchFailed, format("member mask 0x%08x names lanes that the warp does not have", want), int(first));
        if (want & lanes & ~set) continue;
        synchronised(I, set);
        ready |= set;
    }
    return ready;
}

void Warp::synchronised(const Inst& I, uint32_t m) {
    switch (I.kind) {
        case Kind::shuffle: execShuffle(*this, I, m); break;
        case Kind::vote: execVote(*this, I, m); break;
        case Kind::reduce: execReduce(*this, I, m); break;
        case Kind::match: execMatch(*this, I, m); break;
        case Kind::loadMatrix: execLoadMatrix(*this, I, m); break;
        case Kind::moveMatrix: execMoveMatrix(*this, I, m); break;
        case Kind::mma: execMma(*this, I, m); break;
        default: break;
    }
    if (I.kind == Kind::warpBarrier || block.launch.config.shuffleOrders)
        block.clocks.syncLanes(index, m == lanes ? 0xffffffffu : m);
}

Outcome Warp::run(uint64_t budget) {
    Counters& count = block.launch.count;
    const Inst* code = kernel.code.data();
    while (!groups.empty()) {
        size_t which = pick();
        uint32_t pc = groups[which].pc;
        const uint32_t mask = groups[which].mask;
        const bool alone = groups.size() == 1;
        uint32_t meet = ~0u;  // where the next group stands
        for (auto& g : groups)
            if (g.pc > pc) meet = std::min(meet, g.pc);
        bool again = true;    // stay with this group
        while (again) {
            if (pc >= meet) break;
            if (!budget) {
                groups[which].pc = pc;
                return Outcome::preempted;
            }
            budget--;
            const Inst& I = code[pc];
            uint32_t m = mask;
            current = &I;
            currentMask = mask;
            if (I.guarded) {
                if (undefined[I.guard.reg] & mask) demandDefined(I.guard, mask, "the guard");
                m &= predicate(I.guard);
            }
            count.warpInstructions++;
            count.laneInstructions += m == 0xffffffffu ? 32 : __builtin_popcount(m);
            if (!m) {
                pc++;
                continue;
            }
            switch (I.kind) {
                case Kind::alu: {
                    uint32_t u = 0;
                    for (uint32_t i = 0; i < I.ns; i++) u |= undefined[I.s[i].reg];
                    if (u & m) {
                        spreadUndefined(*this, I, m);
                    } else {
                        for (uint32_t i = 0; i < I.nd; i++) undefined[I.d[i].reg] &= ~m;
                    }
                    I.fn(*this, I, m);
                    pc++;
                    break;
                }
                case Kind::load: execLoad(*this, I, m); pc++; break;
                case Kind::store: execStore(*this, I, m); pc++; break;
                case Kind::atomic: execAtomic(*this, I, m); pc++; break;
                case Kind::copyAsync: execCopyAsync(*this, I, m); pc++; break;
                case Kind::commitGroup: execCommit(*this, m); pc++; break;
                case Kind::waitGroup: execWaitGroup(*this, I, m); pc++; break;
                case Kind::fence: execFence(*this, I); pc++; break;
                case Kind::prefetch: pc++; break;
                case Kind::activeMask: case Kind::clock: {
                    uint64_t v = I.kind == Kind::clock ? count.warpInstructions : m;
                    for (uint32_t r = m; r; r &= r - 1) {
                        uint32_t i = __builtin_ctz(r);
                        if (I.d[0].width == 8) at<uint64_t>(I.d[0])[i] = v;
                        else at<uint32_t>(I.d[0])[i] = uint32_t(v);
                    }
                    markDefined(I.d[0], m);
                    pc++;
                    break;
                }
                case Kind::branch:
                    if (m == mask) {
                        pc = I.target;
                    } else {
                        groups[which] = {pc + 1, mask & ~m, false};
                        groups.push_back({I.target, m, false});
                        again = false;
                        break;
                    }
                    if (!alone) {
                        groups[which].pc = pc;
                        again = false;
                    }
                    break;
                case Kind::exit:
                    live &= ~m;
                    if (m == mask) groups.erase(groups.begin() + which);
                    else groups[which] = {pc + 1, mask & ~m, false};
                    again = false;
                    break;
                case Kind::trap: throw Fault(launchFailed, "trap", __builtin_ctz(m));
                default: {
                    if (m != mask) {  // those whose guard holds are a group of their own
                        groups[which] = {pc + 1, mask & ~m, false};
                        groups.push_back({pc, m, false});
                        again = false;
                        break;
                    }
                    uint32_t ready = executeTogether(I, m);
                    if (ready != m) {
                        groups[which] = {pc, m & ~ready, true};
                        if (ready) groups.push_back({pc + 1, ready, false});
                        again = false;
                        break;
                    }
                    pc++;
                    if (I.kind != Kind::blockBarrier) break;
                    groups[which].pc = pc;
                    block.arrive(*this, I, m);
                    if (BarrierMode(I.mode) != BarrierMode::arrive) return Outcome::barrier;
                }
            }
        }
        if (again) groups[which].pc = pc;
    }
    return Outcome::done;
}

}  // namespace ptx
