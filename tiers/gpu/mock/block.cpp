// Blocks of a launch, one after another; warps of a block in turn, until all have ended.
#include <algorithm>
#include <chrono>
#include <numeric>
#include <random>

#include "machine.h"

namespace ptx {

static uint32_t warpsOf(const LaunchConfig& c) { return (c.block.x * c.block.y * c.block.z + 31) / 32; }

Block::Block(Launch& l)
    : launch(l), threads(l.config.block.x * l.config.block.y * l.config.block.z), clocks(warpsOf(l.config)),
      shared(l.kernel.sharedBytes + l.config.dynamicShared, clocks, l.config.checkRaces, l.config.checkUndefined), waits(warpsOf(l.config)) {
    for (uint32_t w = 0; w < clocks.warps; w++) {
        uint32_t n = std::min(32u, threads - w * 32);
        warps.push_back(std::make_unique<Warp>(*this, w, n == 32 ? 0xffffffffu : (1u << n) - 1));
    }
}

Allocation* Block::resolve(uint64_t a, uint32_t n, uint32_t lane) {
    if (lastUsed && lastUsed->holds(a, n)) return lastUsed;
    Allocation* found = launch.memory.find(a, n);
    if (!found) throw Fault(illegalAddress, format("%u bytes at ", n) + launch.memory.explain(a, n), int(lane));
    return lastUsed = found;
}

void Block::arrive(Warp& w, const Inst& I, uint32_t m) {
    BarrierMode mode = BarrierMode(I.mode);
    uint32_t first = mode >= BarrierMode::popc ? 1 : 0;  // operands: {predicate,} barrier {, threads}
    auto uniform = [&](const Ref& r, const char* what) {
        w.demandDefined(r, m, what);
        uint32_t v = w.at<uint32_t>(r)[__builtin_ctz(m)];
        for (uint32_t rest = m; rest; rest &= rest - 1)
            if (w.at<uint32_t>(r)[__builtin_ctz(rest)] != v) throw Fault(launchFailed, std::string(what) + " differs between lanes", __builtin_ctz(rest));
        return v;
    };
    uint32_t id = uniform(I.s[first], "the barrier's number");
    uint32_t count = I.ns > first + 1 ? uniform(I.s[first + 1], "the barrier's thread count") : 0;
    if (id > 15 || count % 32 || count > warps.size() * 32)
        throw Fault(illegalInstruction, format("barrier %u for %u threads", id, count), __builtin_ctz(m));
    Barrier& b = barriers[id];
    if (b.arrived && b.wantedWarps != count / 32)
        throw Fault(launchFailed, format("barrier %u is awaited with different numbers of threads", id), __builtin_ctz(m));
    if (b.arrived && !count && b.where != &I)
        throw Fault(launchFailed, format("divergent barrier: warp %u is at this one while others are at line %d: ", w.index, b.where->line) + b.where->text, __builtin_ctz(m));
    if (std::find(b.waiting.begin(), b.waiting.end(), w.index) != b.waiting.end())
        throw Fault(launchFailed, "a warp waits twice at one barrier", __builtin_ctz(m));
    b.where = &I;
    b.wantedWarps = count / 32;
    b.arrived++;
    if (first) {
        w.demandDefined(I.s[0], m, "the barrier's predicate");
        b.votes += __builtin_popcount(w.predicate(I.s[0]) & m);
    }
    b.threads += __builtin_popcount(m);
    clocks.arrive(w.index, b.knowledge);
    if (mode != BarrierMode::arrive) {
        b.waiting.push_back(w.index);
        waits[w.index] = 1;
    }
    launch.count.barriers++;
    if (count && b.arrived == b.wantedWarps) complete(id);
}

void Block::complete(uint32_t id) {
    Barrier& b = barriers[id];
    for (uint32_t index : b.waiting) {
        Warp& w = *warps[index];
        const Inst& I = *w.current;
        clocks.leave(index, b.knowledge);
        waits[index] = 0;
        if (!I.nd) continue;
        switch (BarrierMode(I.mode)) {
            case BarrierMode::popc:
                for (uint32_t m = w.live; m; m &= m - 1) w.at<uint32_t>(I.d[0])[__builtin_ctz(m)] = b.votes;
                break;
            case BarrierMode::all: w.setPredicate(I.d[0], w.live, b.votes == b.threads ? ~0u : 0); break;
            default: w.setPredicate(I.d[0], w.live, b.votes ? ~0u : 0);
        }
        w.markDefined(I.d[0], w.live);
    }
    b = Barrier{};
}

// Barriers without a thread count are complete when all warps that still run have come.
void Block::checkBarriers() {
    uint32_t running = 0;
    for (auto& w : warps) running += w->live != 0;
    for (uint32_t id = 0; id < 16; id++)
        if (barriers[id].arrived && !barriers[id].wantedWarps && barriers[id].arrived == running) complete(id);
}

void Block::deadlock() {
    std::string s = format("kernel %s, block (%u,%u,%u): deadlock: no warp can go on", launch.kernel.name.c_str(), id.x, id.y, id.z);
    for (auto& w : warps) {
        if (!w->live) s += format("\n    warp %u has ended", w->index);
        else s += format("\n    warp %u waits at line %d: ", w->index, w->current->line) + w->current->text;
    }
    throw Fault(launchFailed, s);
}

void Block::run(Dim which, uint32_t n) {
    id = which;
    number = n;
    clocks.reset();
    shared.reset();
    knows.clear();
    mayKnow.clear();
    fenced = false;
    for (auto& b : barriers) b = Barrier{};
    std::vector<uint32_t> order(warps.size());
    std::iota(order.begin(), order.end(), 0);
    std::mt19937_64 random(launch.config.seed + n);
    for (auto& w : warps) w->start();
    std::fill(waits.begin(), waits.end(), 0);

    for (bool running = true, progress = true; running;) {
        if (!progress) deadlock();
        running = progress = false;
        if (launch.config.seed) std::shuffle(order.begin(), order.end(), random);
        for (uint32_t index : order) {
            Warp& w = *warps[index];
            if (!w.live) continue;
            running = true;
            if (waits[index]) continue;
            progress = true;
            try {
                w.run(launch.config.seed ? 1 + random() % 4096 : 16384);
            } catch (Fault& f) {
                uint32_t lane = f.lane >= 0 ? f.lane : __builtin_ctz(w.currentMask | 1u << 31);
                uint32_t t = index * 32 + lane;
                const Dim& b = launch.config.block;
                throw Fault(f.code, format("kernel %s, line %d, `%s`, block (%u,%u,%u) thread (%u,%u,%u): ",
                    launch.kernel.name.c_str(), w.current ? w.current->line : 0, w.current ? w.current->text.c_str() : "",
                    id.x, id.y, id.z, t % b.x, t / b.x % b.y, t / b.x / b.y) + f.what());
            }
        }
        checkBarriers();
        if (launch.count.laneInstructions > launch.config.maxLaneInstructions)
            throw Fault(launchTimeout, "kernel " + launch.kernel.name + ": too many instructions: does it end?");
    }
    launch.races.finished++;
    launch.count.blocks++;
}

void run(const Kernel& k, const LaunchConfig& c, const uint8_t* params, DeviceMemory& memory, Counters& count) {
    Launch launch{k, c, params, memory, count, {}};
    launch.races.tag = GlobalRaces::launchTag(memory);
    count.launches = 1;
    uint64_t blocks = uint64_t(c.grid.x) * c.grid.y * c.grid.z;
    std::vector<uint32_t> order;
    if (c.seed) {
        order.resize(blocks);
        std::iota(order.begin(), order.end(), 0);
        std::shuffle(order.begin(), order.end(), std::mt19937_64(c.seed));
    }
    auto from = std::chrono::steady_clock::now();
    auto stop = [&] { count.microseconds = uint64_t(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - from).count()); };
    try {
        Block block(launch);
        for (uint64_t i = 0; i < blocks; i++) {
            uint32_t n = c.seed ? order[i] : uint32_t(i);
            block.run({n % c.grid.x, n / c.grid.x % c.grid.y, n / c.grid.x / c.grid.y}, n);
        }
    } catch (...) {
        stop();
        throw;
    }
    stop();
}

}  // namespace ptx
