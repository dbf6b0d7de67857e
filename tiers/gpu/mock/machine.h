// The machine that runs kernels: device memory, and for each block its shared memory, warps and clocks.
#pragma once
#include <array>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "ptx.h"

namespace ptx {

// Results of the driver API that a launch may end with.
enum : int {
    illegalAddress = 700, launchTimeout = 702, illegalInstruction = 715, misalignedAddress = 716,
    invalidAddressSpace = 717, launchFailed = 719,
};

struct Fault : std::runtime_error {
    int code, lane;
    Fault(int c, const std::string& what, int l = -1) : std::runtime_error(what), code(c), lane(l) {}
};

std::string format(const char* f, ...) __attribute__((format(printf, 1, 2)));

// ---- device memory (memory.cpp) ----

// One live allocation with its shadow: which bytes are defined, and who touched them in this launch.
struct Allocation {
    uint64_t base = 0, size = 0;
    uint8_t* data = nullptr;
    uint8_t* defined = nullptr;   // 1 a byte; nullptr for host memory, all of which counts as defined
    uint32_t* writer = nullptr;   // stamps, see GlobalRaces; nullptr for host memory
    uint32_t* reader = nullptr;
    bool holds(uint64_t a, uint64_t n) const { return a >= base && a - base <= size && n <= size - (a - base); }
};

class DeviceMemory {
public:
    explicit DeviceMemory(uint64_t bytes) : capacity(bytes) {}
    ~DeviceMemory();
    uint64_t allocate(uint64_t size);      // 0 if it is full. Addresses are never used again
    bool release(uint64_t base);
    bool overlaps(uint64_t address, uint64_t n) const;   // any live allocation
    void adoptHost(void* p, uint64_t size);
    bool dropHost(void* p);
    Allocation* find(uint64_t a, uint64_t n);  // nullptr unless [a, a+n) lies in one live allocation
    Allocation* starting(uint64_t base);
    int flip(const uint8_t* bytes, size_t n, size_t bit);  // in each place that holds the bytes; returns how many did
    std::string explain(uint64_t a, uint64_t n) const;  // why find returned nullptr
    uint64_t used() const { return inUse; }
    void forgetAccesses();                 // clears writers and readers
    uint64_t capacity;

private:
    std::map<uint64_t, std::unique_ptr<Allocation>> live;
    std::map<uint64_t, uint64_t> freed;    // the last ones, to name them
    uint64_t inUse = 0, nextBase = 0x100000000000ull;
};

// ---- counters ----

struct Counters {
    uint64_t launches = 0, blocks = 0, warpInstructions = 0, laneInstructions = 0, mma = 0, barriers = 0;
    uint64_t globalLoad = 0, globalStore = 0, globalAtomic = 0, globalRequests = 0, globalSectors = 0, copyAsync = 0;
    uint64_t sharedLoad = 0, sharedStore = 0, sharedAtomic = 0, wavefronts = 0, idealWavefronts = 0, paramLoad = 0;
    uint64_t microseconds = 0;             // that the interpreter took
    std::vector<std::pair<const char*, uint64_t>> named() const;
    void add(const Counters&);
};

// ---- one launch ----

struct Dim { uint32_t x = 1, y = 1, z = 1; };

struct LaunchConfig {
    Dim grid, block;
    uint32_t dynamicShared = 0;
    uint64_t seed = 0;                     // not 0: blocks and warps in an order drawn from it
    uint64_t maxLaneInstructions = 20000000000ull;
    bool checkRaces = true, checkUndefined = true;
    bool shuffleOrders = false;            // let shfl and the like order memory, as bar.warp.sync does
};

// Runs all blocks, one after another, and fills in fresh counters. Throws a Fault whose text names kernel, line, block and thread.
void run(const Kernel&, const LaunchConfig&, const uint8_t* params, DeviceMemory&, Counters&);

// Accesses of a launch to global memory by different blocks. A stamp is the launch (11 bits), whether
// the access was atomic (1) and the block (20; all ones: several blocks).
struct GlobalRaces {
    static constexpr uint32_t many = 0xfffff, atomicBit = 1u << 20;
    static uint32_t launchTag(DeviceMemory&);  // of a new launch, shifted
    uint32_t tag = 0;
    struct Released { std::vector<bool> blocks; };
    std::map<uint64_t, Released> released;     // by address of an atomic: what its last writers had done
    uint32_t finished = 0;                     // blocks
};

// ---- shared memory of a block, with races (shared.cpp) ----

// Who knows what of whom. A warp's tick grows at every synchronisation that it takes part in. An access
// is a stamp: the warp's tick, whether it was atomic, and the thread. It happened before the present of a
// thread if that thread knows a later tick of the accessing warp, or lane.
struct Clocks {
    static constexpr uint32_t atomicBit = 1u << 10;
    uint32_t warps;
    std::vector<uint32_t> tick;
    std::vector<uint32_t> known;               // [warp][other]: the newest tick of other that warp waited for
    std::vector<uint32_t> whole;               // [warp]: all lanes know each other up to this tick
    std::vector<std::vector<uint32_t>> pairs;  // [warp][lane*32+lane]: after barriers of some lanes only
    explicit Clocks(uint32_t n) : warps(n), tick(n, 1), known(n * n), whole(n), pairs(n) {}
    void reset();
    uint32_t stamp(uint32_t warp, uint32_t lane, bool atomic) const {
        return tick[warp] << 11 | (atomic ? atomicBit : 0) | warp << 5 | lane;
    }
    bool before(uint32_t stamp, uint32_t warp, uint32_t lane) const;
    void syncLanes(uint32_t warp, uint32_t mask);
    void arrive(uint32_t warp, std::vector<uint32_t>& barrier);        // adds what warp knows
    void leave(uint32_t warp, const std::vector<uint32_t>& barrier);
    void advance(uint32_t warp);
};

class SharedMemory {
public:
    SharedMemory(uint32_t bytes, Clocks&, bool races, bool undefined);
    void reset();
    uint32_t size() const { return bytes; }
    // Each returns which of the n <= 16 bytes are undefined, or takes it. Addresses are aligned.
    uint32_t read(uint64_t at, uint32_t n, uint32_t warp, uint32_t lane, uint8_t* out, bool relaxed = false);
    void write(uint64_t at, uint32_t n, uint32_t warp, uint32_t lane, const uint8_t* in, uint32_t undefined,
               bool relaxed = false);
    uint8_t* atomic(uint64_t at, uint32_t n, uint32_t warp, uint32_t lane);
    void begin(uint64_t at, uint32_t n, uint32_t warp, uint32_t lane);   // bytes are under way
    void deliver(uint64_t at, uint32_t n, uint32_t warp, uint32_t lane, const uint8_t* in, uint32_t undefined);

private:
    enum : uint8_t { undefinedByte = 0, definedByte = 1, inFlight = 2 };
    void check(uint64_t at, uint32_t n, uint32_t lane) const;
    void checkWriter(uint64_t at, uint32_t n, uint32_t warp, uint32_t lane, bool atomic, const char* what) const;
    void claim(uint64_t at, uint32_t n, uint32_t warp, uint32_t lane, bool atomic, const char* what);
    uint32_t bytes;
    Clocks& clocks;
    bool races, checkUndefined;
    std::vector<uint8_t> data, state;
    std::vector<uint32_t> writer, readerWarps, readers;  // readers: [warp][byte]
};

// ---- warps ----

struct Block;

struct PendingCopy { uint32_t to, undefined, group; uint8_t n; uint8_t data[16]; };

// Lanes at the same instruction. Parked: they wait for other lanes to come to it.
struct Group { uint32_t pc, mask; bool parked; };

enum class Outcome : uint8_t { done, barrier, preempted };

struct Warp {
    Block& block;
    const Kernel& kernel;
    uint32_t index, lanes;         // lanes: those that exist
    uint32_t live = 0;             // those that have not left the kernel
    std::vector<Group> groups;
    const Inst* current = nullptr;
    uint32_t currentMask = 0;

    uint8_t* regs;
    std::vector<uint32_t> undefined;                 // [register]: lanes with an undefined byte
    std::vector<uint32_t> unwritten;                 // of those: lanes of which every byte is
    std::vector<std::array<uint8_t, 32>> undefinedBytes;  // of the others: which bytes
    std::vector<PendingCopy> pending[32];
    uint32_t committed[32];

    Warp(Block&, uint32_t index, uint32_t lanes);
    Warp(const Warp&) = delete;
    Warp(Warp&& o) = delete;
    ~Warp();
    void start();
    Outcome run(uint64_t budget);  // until it ends, waits at a barrier of the block or has had its share

    template <class T>
    T* at(const Ref& r) { return reinterpret_cast<T*>(regs + r.at); }
    uint32_t predicate(const Ref& r) {
        uint32_t p = *at<uint32_t>(r);
        return r.negated ? ~p : p;
    }
    void setPredicate(const Ref& r, uint32_t mask, uint32_t value) {
        uint32_t& p = *at<uint32_t>(r);
        p = (p & ~mask) | (value & mask);
    }
    void widen(const Ref& r, uint64_t out[32]);      // zero-extended
    void demandDefined(const Ref& r, uint32_t mask, const char* what);
    void markDefined(const Ref& r, uint32_t mask) { undefined[r.reg] &= ~mask; }
    void markUndefined(const Ref& r, uint32_t lane, uint8_t bytes) {
        if (!bytes) {
            undefined[r.reg] &= ~(1u << lane);
            return;
        }
        undefined[r.reg] |= 1u << lane;
        unwritten[r.reg] &= ~(1u << lane);
        undefinedBytes[r.reg][lane] = bytes;
    }
    uint8_t undefinedIn(const Ref& r, uint32_t lane) const {
        if (!(undefined[r.reg] >> lane & 1)) return 0;
        return unwritten[r.reg] >> lane & 1 ? uint8_t((1u << r.width) - 1) : undefinedBytes[r.reg][lane];
    }

private:
    std::unique_ptr<uint8_t[]> file;
    size_t pick();
    [[noreturn]] void stuck();
    uint32_t executeTogether(const Inst&, uint32_t mask);
    void synchronised(const Inst&, uint32_t mask);
};

void spreadUndefined(Warp&, const Inst&, uint32_t mask);  // poison.cpp

// exchange.cpp, access.cpp, matrix.cpp
void execShuffle(Warp&, const Inst&, uint32_t);
void execVote(Warp&, const Inst&, uint32_t);
void execReduce(Warp&, const Inst&, uint32_t);
void execMatch(Warp&, const Inst&, uint32_t);
void execLoad(Warp&, const Inst&, uint32_t);
void execStore(Warp&, const Inst&, uint32_t);
void execAtomic(Warp&, const Inst&, uint32_t);
void execCopyAsync(Warp&, const Inst&, uint32_t);
void execCommit(Warp&, uint32_t);
void execWaitGroup(Warp&, const Inst&, uint32_t);
void execFence(Warp&, const Inst&);
void execLoadMatrix(Warp&, const Inst&, uint32_t);
void execMoveMatrix(Warp&, const Inst&, uint32_t);
void execMma(Warp&, const Inst&, uint32_t);

// ---- one block (block.cpp) ----

struct Barrier {
    uint32_t wantedWarps = 0;      // 0: all that live
    uint32_t arrived = 0;          // warps, waiting or not
    std::vector<uint32_t> waiting;
    std::vector<uint32_t> knowledge;
    const Inst* where = nullptr;
    uint32_t votes = 0;            // threads whose predicate held
    uint32_t threads = 0;
};

struct Launch {
    const Kernel& kernel;
    const LaunchConfig& config;
    const uint8_t* params;
    DeviceMemory& memory;
    Counters& count;
    GlobalRaces races;
};

struct Block {
    Launch& launch;
    Dim id;
    uint32_t number = 0, threads;
    Clocks clocks;
    SharedMemory shared;
    std::vector<std::unique_ptr<Warp>> warps;
    Barrier barriers[16];
    Allocation* lastUsed = nullptr;          // most accesses are to the same allocation as the last
    // What of other blocks' work this one may read: it has seen their atomics, between fences.
    std::vector<bool> knows, mayKnow;
    bool fenced = false;

    explicit Block(Launch&);
    void run(Dim id, uint32_t number);
    void arrive(Warp&, const Inst&, uint32_t mask);   // at a barrier of the block
    Allocation* resolve(uint64_t a, uint32_t n, uint32_t lane);

private:
    std::vector<uint8_t> waits;              // [warp]
    void complete(uint32_t id);
    void checkBarriers();
    [[noreturn]] void deadlock();
};

}  // namespace ptx
