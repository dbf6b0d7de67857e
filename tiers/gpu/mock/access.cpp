// Loads, stores, atomics and asynchronous copies.
#include <algorithm>

#include "half.h"
#include "machine.h"

namespace ptx {
namespace {

struct Addresses { uint64_t a[32]; };

Addresses addressesOf(Warp& w, const Inst& I, uint32_t m, const Ref& r, int64_t offset) {
    w.demandDefined(r, m, "the address");
    Addresses out;
    w.widen(r, out.a);
    for (auto& a : out.a) a += offset;
    if (r.width == 4 && I.space != Space::shared) throw Fault(invalidAddressSpace, "a 32-bit address outside shared memory");
    return out;
}

void demandAligned(uint64_t a, uint32_t n, uint32_t lane) {
    if (a % n) throw Fault(misalignedAddress, format("0x%lx is not aligned to the %u bytes of the access", a, n), int(lane));
}

// Whether an address of the instruction's space is in shared memory; turns it into an offset.
bool sharedOffset(const Inst& I, uint64_t& a) {
    if (I.space == Space::shared) {
        a &= 0xffffffffu;
        return true;
    }
    if (I.space != Space::generic || a - sharedWindow >= sharedWindowBytes) return false;
    a -= sharedWindow;
    return true;
}

// ---- what an access costs ----

// How often the banks of shared memory have to be read: of 32 lanes with up to 4 bytes together, of 16
// with 8, of 8 with 16; words of one bank that differ queue up.
void countWavefronts(Counters& c, const uint64_t* at, uint32_t m, uint32_t n) {
    uint32_t together = n <= 4 ? 32 : 128 / n;
    for (uint32_t from = 0; from < 32; from += together) {
        uint32_t part = together == 32 ? m : m >> from & ((1u << together) - 1);
        if (!part) continue;
        uint32_t words[32][32], used[32] = {}, worst = 1;
        for (; part; part &= part - 1) {
            uint64_t a = at[from + __builtin_ctz(part)];
            for (uint32_t k = 0; k < std::max(n, 4u); k += 4) {
                uint32_t word = uint32_t(a / 4 + k / 4), bank = word & 31, i = 0;
                while (i < used[bank] && words[bank][i] != word) i++;
                if (i < used[bank]) continue;
                if (used[bank] < 32) words[bank][used[bank]++] = word;
                worst = std::max(worst, used[bank]);
            }
        }
        c.wavefronts += worst;
        c.idealWavefronts++;
    }
}

// How many sectors of 32 bytes a request of a warp touches.
void countSectors(Counters& c, const uint64_t* at, uint32_t m, uint32_t n) {
    uint64_t table[128] = {};
    c.globalRequests++;
    for (uint64_t last = 0; m; m &= m - 1) {
        uint64_t sector = at[__builtin_ctz(m)] / 32 + 1;
        (void)n;  // aligned accesses of up to 16 bytes lie in one sector
        if (sector == last) continue;
        last = sector;
        uint32_t i = uint32_t(sector * 0x9e3779b97f4a7c15ull >> 57);
        while (table[i] && table[i] != sector) i = (i + 1) & 127;
        c.globalSectors += !table[i];
        table[i] = sector;
    }
}

// ---- global memory ----

bool blockKnows(const Block& b, uint32_t other) {
    if (other != GlobalRaces::many) return other < b.knows.size() && b.knows[other];
    return uint32_t(std::count(b.knows.begin(), b.knows.end(), true)) >= b.launch.races.finished;
}

[[noreturn]] void globalRace(Block& b, const char* what, const char* other, uint32_t stamp, uint64_t a, uint32_t lane) {
    uint32_t n = stamp & GlobalRaces::many;
    const Dim& g = b.launch.config.grid;
    std::string who = n == GlobalRaces::many ? "several blocks"
        : format("block (%u,%u,%u)", n % g.x, n / g.x % g.y, n / g.x / g.y);
    throw Fault(launchFailed, format("race between blocks: %s of 0x%lx, which ", what, a) + who + " " + other + " in the same launch", int(lane));
}

void merge(std::vector<bool>& into, const std::vector<bool>& from) {
    if (into.size() < from.size()) into.resize(from.size());
    for (size_t i = 0; i < from.size(); i++)
        if (from[i]) into[i] = true;
}

// What is written atomically at an address publishes what its block did before its last fence; who reads
// it atomically knows that after its next fence.
void publish(Block& b, uint64_t a, bool release) {
    if (!b.fenced && !release) return;
    auto& at = b.launch.races.released[a];
    merge(at.blocks, b.knows);
    if (at.blocks.size() <= b.number) at.blocks.resize(b.number + 1);
    at.blocks[b.number] = true;
}
void learn(Block& b, uint64_t a, bool acquire) {
    auto at = b.launch.races.released.find(a);
    if (at == b.launch.races.released.end()) return;
    merge(b.mayKnow, at->second.blocks);
    if (acquire) merge(b.knows, b.mayKnow);
}

// A relaxed read does not race with relaxed or atomic writes, and leaves no trace.
void noteRead(Block& b, Allocation& al, uint64_t a, uint32_t n, uint32_t lane, bool relaxed, bool acquire) {
    const uint32_t me = b.launch.races.tag | b.number, *w = al.writer + (a - al.base);
    uint32_t* r = al.reader + (a - al.base);
    if (relaxed) learn(b, a, acquire);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t x = w[i] ^ me;
        if (relaxed && w[i] & GlobalRaces::atomicBit) continue;
        if (x < 1u << 21 && x & GlobalRaces::many && !blockKnows(b, w[i] & GlobalRaces::many)) globalRace(b, "read", "wrote", w[i], a + i, lane);
    }
    if (relaxed) return;
    for (uint32_t i = 0; i < n; i++) {
        bool other = (r[i] ^ me) < 1u << 21 && r[i] != me;
        r[i] = other ? me | GlobalRaces::many : me;
    }
}

void noteWrite(Block& b, Allocation& al, uint64_t a, uint32_t n, uint32_t lane, bool atomic) {
    const uint32_t me = b.launch.races.tag | b.number | (atomic ? GlobalRaces::atomicBit : 0);
    uint32_t *w = al.writer + (a - al.base), *r = al.reader + (a - al.base);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t x = w[i] ^ me, y = r[i] ^ me;
        bool otherWrote = x < 1u << 21 && x & GlobalRaces::many, otherRead = y < 1u << 21 && y & GlobalRaces::many;
        bool bothAtomic = atomic && w[i] & GlobalRaces::atomicBit;
        if (otherWrote && !bothAtomic && !blockKnows(b, w[i] & GlobalRaces::many)) globalRace(b, "write", "wrote", w[i], a + i, lane);
        if (otherRead && !blockKnows(b, r[i] & GlobalRaces::many)) globalRace(b, "write", "read", r[i], a + i, lane);
        w[i] = otherWrote && bothAtomic ? me | GlobalRaces::many : me;
    }
}

uint32_t undefinedBytesAt(const Allocation& al, uint64_t a, uint32_t n) {
    if (!al.defined) return 0;
    const uint8_t* d = al.defined + (a - al.base);
    uint32_t u = 0;
    if (n == 16) {
        uint64_t x[2];
        std::memcpy(x, d, 16);
        if (x[0] == 0x0101010101010101ull && x[1] == x[0]) return 0;
    } else if (n == 4) {
        uint32_t x;
        std::memcpy(&x, d, 4);
        if (x == 0x01010101u) return 0;
    }
    for (uint32_t i = 0; i < n; i++) u |= uint32_t(!d[i]) << i;
    return u;
}

uint32_t readGlobal(Block& b, uint64_t a, uint32_t n, uint32_t lane, uint8_t* out, const Inst& I) {
    demandAligned(a, n, lane);
    Allocation& al = *b.resolve(a, n, lane);
    std::memcpy(out, al.data + (a - al.base), n);
    if (al.writer && b.launch.config.checkRaces) noteRead(b, al, a, n, lane, I.relaxed, I.acquire);
    return undefinedBytesAt(al, a, n);
}

// The bytes of a value of the type in a register: its low ones, which an undefined mask is cut to.
void putLane(Warp& w, const Ref& d, uint32_t lane, Type t, const uint8_t* from, uint8_t undefined) {
    uint64_t v = 0;
    int n = bytesOf(t);
    std::memcpy(&v, from, n);
    if (isSigned(t) && !isFloat(t) && n < d.width) v = uint64_t(int64_t(v << (64 - 8 * n)) >> (64 - 8 * n));
    if (d.width == 4) w.at<uint32_t>(d)[lane] = uint32_t(v);
    else if (d.width == 8) w.at<uint64_t>(d)[lane] = v;
    else w.at<uint16_t>(d)[lane] = uint16_t(v);
    if (undefined && isSigned(t) && undefined >> (n - 1) & 1) undefined |= uint8_t(0xff << n);
    w.markUndefined(d, lane, undefined & ((1u << d.width) - 1));
}

}  // namespace

void execLoad(Warp& w, const Inst& I, uint32_t m) {
    Block& b = w.block;
    Counters& c = b.launch.count;
    const uint32_t n = I.size * I.vec, lanes = __builtin_popcount(m);
    if (I.space == Space::param) {
        c.paramLoad += n;
        for (uint32_t r = m; r; r &= r - 1)
            for (uint32_t v = 0; v < I.vec; v++) putLane(w, I.d[v], __builtin_ctz(r), I.type, b.launch.params + I.offset + v * I.size, 0);
        return;
    }
    Addresses at = addressesOf(w, I, m, I.s[0], I.offset);
    uint8_t bytes[32][16];
    uint32_t undefined[32], any = 0, inShared = 0;
    for (uint32_t r = m; r; r &= r - 1) {
        uint32_t i = __builtin_ctz(r);
        if (sharedOffset(I, at.a[i])) {
            inShared |= 1u << i;
            undefined[i] = b.shared.read(at.a[i], n, w.index, i, bytes[i], I.relaxed);
        } else {
            undefined[i] = readGlobal(b, at.a[i], n, i, bytes[i], I);
        }
        any |= undefined[i];
    }
    if (inShared) {
        c.sharedLoad += n * __builtin_popcount(inShared);
        countWavefronts(c, at.a, inShared, n);
    }
    if (inShared != m) {
        c.globalLoad += n * (lanes - __builtin_popcount(inShared));
        countSectors(c, at.a, m & ~inShared, n);
    }
    for (uint32_t v = 0; v < I.vec; v++) {
        const Ref& d = I.d[v];
        if (I.size == 4 && d.width == 4 && !any) {
            uint32_t* to = w.at<uint32_t>(d);
            for (uint32_t r = m; r; r &= r - 1) {
                uint32_t i = __builtin_ctz(r);
                std::memcpy(to + i, bytes[i] + 4 * v, 4);
            }
            w.markDefined(d, m);
            continue;
        }
        for (uint32_t r = m; r; r &= r - 1) {
            uint32_t i = __builtin_ctz(r);
            putLane(w, d, i, I.type, bytes[i] + v * I.size, uint8_t(undefined[i] >> v * I.size & ((1u << I.size) - 1)));
        }
    }
}

void execStore(Warp& w, const Inst& I, uint32_t m) {
    Block& b = w.block;
    Counters& c = b.launch.count;
    const uint32_t n = I.size * I.vec;
    Addresses at = addressesOf(w, I, m, I.s[0], I.offset);
    uint32_t inShared = 0;
    for (uint32_t r = m; r; r &= r - 1) {
        uint32_t i = __builtin_ctz(r), undefined = 0;
        uint8_t bytes[16];
        for (uint32_t v = 0; v < I.vec; v++) {
            const Ref& s = I.s[1 + v];
            std::memcpy(bytes + v * I.size, w.at<uint8_t>(s) + i * s.width, I.size);
            undefined |= uint32_t(w.undefinedIn(s, i) & ((1u << I.size) - 1)) << v * I.size;
        }
        uint64_t a = at.a[i];
        if (sharedOffset(I, at.a[i])) {
            inShared |= 1u << i;
            b.shared.write(at.a[i], n, w.index, i, bytes, undefined, I.relaxed);
            continue;
        }
        demandAligned(a, n, i);
        Allocation& al = *b.resolve(a, n, i);
        if (al.writer && b.launch.config.checkRaces) {
            noteWrite(b, al, a, n, i, I.relaxed);
            if (I.relaxed) publish(b, a, I.release);
        }
        std::memcpy(al.data + (a - al.base), bytes, n);
        if (al.defined)
            for (uint32_t k = 0; k < n; k++) al.defined[a - al.base + k] = !(undefined >> k & 1);
        else if (undefined && b.launch.config.checkUndefined)
            throw Fault(launchFailed, "an undefined value is stored to host memory", int(i));
    }
    if (inShared) {
        c.sharedStore += n * __builtin_popcount(inShared);
        countWavefronts(c, at.a, inShared, n);
    }
    if (inShared != m) {
        c.globalStore += n * __builtin_popcount(m & ~inShared);
        countSectors(c, at.a, m & ~inShared, n);
    }
}

// ---- atomics ----

template <class T>
static T updated(AtomicOp op, T old, T x, T swap) {
    switch (op) {
        case AtomicOp::add: return T(old + x);
        case AtomicOp::min: return std::min(old, x);
        case AtomicOp::max: return std::max(old, x);
        case AtomicOp::exch: return x;
        case AtomicOp::cas: return old == x ? swap : old;
        default: break;
    }
    if constexpr (std::is_integral_v<T>) {
        switch (op) {
            case AtomicOp::inc: return old >= x ? T(0) : T(old + 1);
            case AtomicOp::dec: return old == 0 || old > x ? x : T(old - 1);
            case AtomicOp::bitAnd: return old & x;
            case AtomicOp::bitOr: return old | x;
            default: return old ^ x;
        }
    }
    return x;
}
template <class T>
static uint64_t update(AtomicOp op, uint8_t* p, uint64_t x, uint64_t swap) {
    T old, a, b;
    std::memcpy(&old, p, sizeof old);
    std::memcpy(&a, &x, sizeof a);
    std::memcpy(&b, &swap, sizeof b);
    T now = updated(op, old, a, b);
    std::memcpy(p, &now, sizeof now);
    uint64_t r = 0;
    std::memcpy(&r, &old, sizeof old);
    return r;
}

void execFence(Warp& w, const Inst& I) {
    if (!I.imm) return;
    w.block.fenced = true;
    merge(w.block.knows, w.block.mayKnow);
}

void execAtomic(Warp& w, const Inst& I, uint32_t m) {
    Block& b = w.block;
    Counters& c = b.launch.count;
    const uint32_t n = I.size;
    Addresses at = addressesOf(w, I, m, I.s[0], I.offset);
    for (int k = 1; k < I.ns; k++) w.demandDefined(I.s[k], m, "the operand of an atomic");
    uint64_t x[32], swap[32] = {};
    w.widen(I.s[1], x);
    if (I.ns > 2) w.widen(I.s[2], swap);
    for (uint32_t r = m; r; r &= r - 1) {
        uint32_t i = __builtin_ctz(r);
        uint64_t a = at.a[i];
        uint8_t* p;
        if (sharedOffset(I, a)) {
            p = b.shared.atomic(a, n, w.index, i);
            c.sharedAtomic += n;
        } else {
            demandAligned(a, n, i);
            Allocation& al = *b.resolve(a, n, i);
            if (undefinedBytesAt(al, a, n) && b.launch.config.checkUndefined) throw Fault(launchFailed, format("atomic on undefined memory at 0x%lx", a), int(i));
            if (al.writer && b.launch.config.checkRaces) {
                learn(b, a, I.acquire);
                publish(b, a, I.release);
                noteWrite(b, al, a, n, i, true);
            }
            p = al.data + (a - al.base);
            c.globalAtomic += n;
        }
        uint64_t old;
        switch (I.type) {
            case Type::s32: old = update<int32_t>(AtomicOp(I.mode), p, x[i], swap[i]); break;
            case Type::s64: old = update<int64_t>(AtomicOp(I.mode), p, x[i], swap[i]); break;
            case Type::f32: old = update<float>(AtomicOp(I.mode), p, x[i], swap[i]); break;
            case Type::u64: case Type::b64: old = update<uint64_t>(AtomicOp(I.mode), p, x[i], swap[i]); break;
            default: old = update<uint32_t>(AtomicOp(I.mode), p, x[i], swap[i]);
        }
        if (!I.nd) continue;
        if (I.d[0].width == 8) w.at<uint64_t>(I.d[0])[i] = old;
        else w.at<uint32_t>(I.d[0])[i] = uint32_t(old);
    }
    if (I.nd) w.markDefined(I.d[0], m);
}

// ---- asynchronous copies: read when issued, there when waited for ----

void execCopyAsync(Warp& w, const Inst& I, uint32_t m) {
    Block& b = w.block;
    Counters& c = b.launch.count;
    const uint32_t n = I.size;
    w.demandDefined(I.s[0], m, "the address");
    w.demandDefined(I.s[1], m, "the address");
    uint64_t to[32], from[32];
    w.widen(I.s[0], to);
    w.widen(I.s[1], from);
    if (I.s[1].width != 8) throw Fault(invalidAddressSpace, "a 32-bit address of global memory");
    if (I.mode) w.demandDefined(I.s[2], m, "the size to copy");
    for (uint32_t r = m; r; r &= r - 1) {
        uint32_t i = __builtin_ctz(r), size = n;
        if (I.mode == 1) size = w.at<uint32_t>(I.s[2])[i];
        if (I.mode == 2 && w.predicate(I.s[2]) >> i & 1) size = 0;
        if (size > n) throw Fault(launchFailed, format("cp.async of %u bytes with a source of %u", n, size), int(i));
        PendingCopy p{};
        p.to = uint32_t(to[i]) + I.imm;
        to[i] = p.to;
        p.n = uint8_t(n);
        p.group = w.committed[i];
        from[i] += I.offset;
        demandAligned(from[i], n, i);
        b.shared.begin(p.to, n, w.index, i);
        if (size) {
            Allocation& al = *b.resolve(from[i], size, i);
            std::memcpy(p.data, al.data + (from[i] - al.base), size);
            if (al.writer && b.launch.config.checkRaces) noteRead(b, al, from[i], size, i, false, false);
            p.undefined = undefinedBytesAt(al, from[i], size);
        }
        c.copyAsync += size;
        w.pending[i].push_back(p);
    }
    countSectors(c, from, m, n);
    countWavefronts(c, to, m, n);
}

void execCommit(Warp& w, uint32_t m) {
    for (; m; m &= m - 1) w.committed[__builtin_ctz(m)]++;
}

void execWaitGroup(Warp& w, const Inst& I, uint32_t m) {
    for (; m; m &= m - 1) {
        uint32_t i = __builtin_ctz(m);
        auto& list = w.pending[i];
        auto over = [&](const PendingCopy& p) { return I.mode == 1 || (p.group + I.imm < w.committed[i]); };
        for (auto& p : list)
            if (over(p)) w.block.shared.deliver(p.to, p.n, w.index, i, p.data, p.undefined);
        list.erase(std::remove_if(list.begin(), list.end(), over), list.end());
    }
}

}  // namespace ptx
