// Shared memory of a block, and who may see what in it.
#include <algorithm>

#include "machine.h"

namespace ptx {

// ---- clocks ----

void Clocks::reset() {
    std::fill(tick.begin(), tick.end(), 1);
    std::fill(known.begin(), known.end(), 0);
    std::fill(whole.begin(), whole.end(), 0);
    for (auto& p : pairs) p.clear();
}

bool Clocks::before(uint32_t stamp, uint32_t warp, uint32_t lane) const {
    uint32_t then = stamp >> 11, who = stamp >> 5 & 31, whose = stamp & 31;
    if (who != warp) return known[warp * warps + who] > then;
    if (whose == lane || whole[warp] > then) return true;
    return !pairs[warp].empty() && pairs[warp][lane * 32 + whose] > then;
}

void Clocks::advance(uint32_t warp) {
    if (++tick[warp] >= 1u << 21) throw Fault(launchFailed, "more than two million synchronisations of one warp");
}

// Lanes of the mask learn what each of them knew, and each other's past.
void Clocks::syncLanes(uint32_t warp, uint32_t mask) {
    advance(warp);
    if (mask == 0xffffffffu) {
        whole[warp] = tick[warp];
        return;
    }
    auto& p = pairs[warp];
    if (p.empty()) p.resize(1024);
    uint32_t joined[32];
    for (uint32_t other = 0; other < 32; other++) {
        joined[other] = mask >> other & 1 ? tick[warp] : 0;
        for (uint32_t l = 0; l < 32; l++)
            if (mask >> l & 1) joined[other] = std::max(joined[other], p[l * 32 + other]);
    }
    for (uint32_t l = 0; l < 32; l++)
        if (mask >> l & 1) std::copy(joined, joined + 32, &p[l * 32]);
}

void Clocks::arrive(uint32_t warp, std::vector<uint32_t>& barrier) {
    advance(warp);
    barrier.resize(warps);
    for (uint32_t w = 0; w < warps; w++) barrier[w] = std::max(barrier[w], known[warp * warps + w]);
    barrier[warp] = tick[warp];
}

void Clocks::leave(uint32_t warp, const std::vector<uint32_t>& barrier) {
    for (uint32_t w = 0; w < warps; w++) known[warp * warps + w] = std::max(known[warp * warps + w], barrier[w]);
    whole[warp] = tick[warp];
}

// ---- bytes ----

SharedMemory::SharedMemory(uint32_t n, Clocks& c, bool r, bool u)
    : bytes(n), clocks(c), races(r), checkUndefined(u), data(n), state(n), writer(n), readerWarps(n), readers(size_t(n) * c.warps) {}

void SharedMemory::reset() {
    std::fill(data.begin(), data.end(), 0xa5);
    std::fill(state.begin(), state.end(), uint8_t(undefinedByte));
    std::fill(writer.begin(), writer.end(), 0);
    std::fill(readerWarps.begin(), readerWarps.end(), 0);
}

void SharedMemory::check(uint64_t at, uint32_t n, uint32_t lane) const {
    if (at > bytes || n > bytes - at)
        throw Fault(illegalAddress, format("%u bytes at offset %ld of shared memory; the block has %u", n, long(at), bytes), int(lane));
    if (at % n) throw Fault(misalignedAddress, format("%u bytes at offset %lu of shared memory", n, at), int(lane));
    uint8_t flight = 0;
    for (uint32_t i = 0; i < n; i++) flight |= state[at + i];
    if (flight & inFlight)
        throw Fault(launchFailed, format("race: shared memory at offset %lu is still being written by a cp.async of thread %u, "
            "which has not waited for its group", at, writer[at] & 1023), int(lane));
}

void SharedMemory::checkWriter(uint64_t at, uint32_t n, uint32_t warp, uint32_t lane, bool atomic, const char* what) const {
    uint32_t last = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t s = writer[at + i];
        if (!s || s == last) continue;  // nobody wrote it, or was just found right
        last = s;
        if ((atomic && (s & Clocks::atomicBit)) || clocks.before(s, warp, lane)) continue;
        throw Fault(launchFailed, format("race: %s of shared memory at offset %lu, which thread %u wrote with no barrier between",
            what, at + i, s & 1023), int(lane));
    }
}

uint32_t SharedMemory::read(uint64_t at, uint32_t n, uint32_t warp, uint32_t lane, uint8_t* out, bool relaxed) {
    check(at, n, lane);
    std::memcpy(out, &data[at], n);
    if (races) {
        checkWriter(at, n, warp, lane, relaxed, "read");
    }
    if (races && !relaxed) {
        uint32_t me = clocks.stamp(warp, lane, false), *r = &readers[size_t(warp) * bytes + at], bit = 1u << warp;
        for (uint32_t i = 0; i < n; i++) {
            // Of several lanes that read in one tick only the fact that they were several is kept, in
            // the bit that stamps of readers do not need.
            bool several = readerWarps[at + i] & bit && r[i] >> 11 == me >> 11 && ((r[i] ^ me) & 31 || r[i] & Clocks::atomicBit);
            r[i] = several ? me | Clocks::atomicBit : me;
            readerWarps[at + i] |= bit;
        }
    }
    uint32_t undefined = 0;
    for (uint32_t i = 0; i < n; i++) undefined |= uint32_t(state[at + i] == undefinedByte) << i;
    return undefined;
}

// A write must come after every write and every read before it.
void SharedMemory::claim(uint64_t at, uint32_t n, uint32_t warp, uint32_t lane, bool atomic, const char* what) {
    check(at, n, lane);
    if (!races) return;
    checkWriter(at, n, warp, lane, atomic, what);
    uint32_t me = clocks.stamp(warp, lane, atomic);
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t m = readerWarps[at + i]; m; m &= m - 1) {
            uint32_t w = __builtin_ctz(m), s = readers[size_t(w) * bytes + at + i];
            bool several = s & Clocks::atomicBit;
            bool ok = several && w == warp ? clocks.before((s & ~31u) | ((lane + 1) & 31), warp, lane) : clocks.before(s, warp, lane);
            if (!ok)
                throw Fault(launchFailed, format("race: %s of shared memory at offset %lu, which thread %u%s read with no barrier between",
                    what, at + i, w << 5 | (s & 31), several ? " (and others)" : ""), int(lane));
        }
        writer[at + i] = me;
        readerWarps[at + i] = 0;
    }
}

void SharedMemory::write(uint64_t at, uint32_t n, uint32_t warp, uint32_t lane, const uint8_t* in, uint32_t undefined, bool relaxed) {
    claim(at, n, warp, lane, relaxed, "write");
    std::memcpy(&data[at], in, n);
    for (uint32_t i = 0; i < n; i++) state[at + i] = undefined >> i & 1 ? undefinedByte : definedByte;
}

uint8_t* SharedMemory::atomic(uint64_t at, uint32_t n, uint32_t warp, uint32_t lane) {
    claim(at, n, warp, lane, true, "atomic");
    for (uint32_t i = 0; i < n; i++)
        if (state[at + i] == undefinedByte && checkUndefined)
            throw Fault(launchFailed, format("atomic on undefined shared memory at offset %lu", at), int(lane));
    return &data[at];
}

void SharedMemory::begin(uint64_t at, uint32_t n, uint32_t warp, uint32_t lane) {
    claim(at, n, warp, lane, false, "cp.async");
    if (!races) std::fill_n(&writer[at], n, clocks.stamp(warp, lane, false));
    std::fill_n(&state[at], n, uint8_t(inFlight));
}

// Who waited for bytes has written them now.
void SharedMemory::deliver(uint64_t at, uint32_t n, uint32_t warp, uint32_t lane, const uint8_t* in, uint32_t undefined) {
    std::memcpy(&data[at], in, n);
    for (uint32_t i = 0; i < n; i++) {
        state[at + i] = undefined >> i & 1 ? undefinedByte : definedByte;
        writer[at + i] = clocks.stamp(warp, lane, false);
    }
}

}  // namespace ptx
