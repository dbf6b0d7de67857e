// What tests ask of the mock: faults, limits, counters; by functions that dlsym finds, or by environment.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "state.h"

namespace mock {

static void readEnvironment(State&);

State& state() {
    static State* s = [] {
        auto* made = new State;  // never destroyed: other threads may still call at exit
        made->memory = std::make_unique<ptx::DeviceMemory>(1ull << 30);
        readEnvironment(*made);
        return made;
    }();
    return *s;
}

Context*& current() {
    static thread_local Context* c = nullptr;
    return c;
}

void say(const std::string& what) {
    state().lastError = what;
    std::fprintf(stderr, "mock CUDA: %s\n", what.c_str());
}

void fail(CUresult code, const std::string& what) {
    State& s = state();
    if (!s.sticky) {
        s.sticky = code;
        say("error " + std::to_string(code) + ": " + what);
    }
}

static std::string plain(const std::string& name) {  // without the suffix of a version
    size_t n = name.size();
    return n > 3 && name[n - 3] == '_' && name[n - 2] == 'v' ? name.substr(0, n - 3) : name;
}

// Results after which a context is of no use.
static bool kills(CUresult r) { return r == 214 || r == 700 || r == 702 || (r >= 714 && r <= 719); }

Entry::Entry(const char* name, Needs needs) : lock(state().lock) {
    State& s = state();
    std::string p = plain(name);
    s.calls[p]++;
    auto f = s.failures.find(p);
    if (f != s.failures.end() && --f->second.after <= 0) {
        refused = f->second.result;
        s.failures.erase(f);
        if (kills(refused)) fail(refused, std::string(name) + " failed, as asked");
        return;
    }
    if (needs >= device && !s.initialised) refused = CUDA_ERROR_NOT_INITIALIZED;
    else if (needs >= context && !current()) refused = CUDA_ERROR_INVALID_CONTEXT;
    else if (needs >= device && s.sticky) refused = s.sticky;
}

// "cuMemAlloc:3:2,cuLaunchKernel:1:719": the third allocation from now is out of memory, ...
static void failures(State& s, const char* list) {
    std::string all = list;
    for (size_t at = 0; at < all.size();) {
        size_t end = std::min(all.find(',', at), all.size());
        char name[64];
        int n = 1, result = CUDA_ERROR_UNKNOWN;
        if (std::sscanf(all.substr(at, end - at).c_str(), "%63[^:]:%d:%d", name, &n, &result) >= 1) s.failures[plain(name)] = {n, result};
        at = end + 1;
    }
}

static bool off(const char* name) {
    const char* v = std::getenv(name);
    return v && (!std::strcmp(v, "off") || !std::strcmp(v, "0"));
}

static void readEnvironment(State& s) {
    if (const char* v = std::getenv("MOCKCUDA_LOG")) s.log = std::strcmp(v, "-") ? std::fopen(v, "a") : stderr;
    if (const char* v = std::getenv("MOCKCUDA_MEMORY")) s.memory->capacity = std::strtoull(v, nullptr, 0);
    if (const char* v = std::getenv("MOCKCUDA_SEED")) s.settings.seed = std::strtoull(v, nullptr, 0);
    if (const char* v = std::getenv("MOCKCUDA_MAX_INSTRUCTIONS")) s.settings.maxLaneInstructions = std::strtoull(v, nullptr, 0);
    if (const char* v = std::getenv("MOCKCUDA_FAIL")) failures(s, v);
    if (const char* v = std::getenv("MOCKCUDA_DROP_WAIT")) s.dropWaitIn = std::atoi(v);
    if (const char* v = std::getenv("MOCKCUDA_DROP_SYNC")) {  // kernel:n
        std::string all = v;
        size_t colon = std::min(all.find(':'), all.size());
        s.dropSyncOf = all.substr(0, colon);
        s.dropSync = colon < all.size() ? std::atoi(v + colon + 1) : 1;
    }
    if (const char* v = std::getenv("MOCKCUDA_LOST")) s.sticky = std::atoi(v);
    s.settings.checkRaces = !off("MOCKCUDA_RACES");
    s.settings.checkUndefined = !off("MOCKCUDA_UNDEFINED");
    s.settings.shuffleOrders = std::getenv("MOCKCUDA_SHUFFLE_ORDERS") != nullptr;
    s.strictFree = std::getenv("MOCKCUDA_STRICT_FREE") != nullptr;
}

}  // namespace mock

// ---- for tests, by dlsym ----

using mock::state;

extern "C" {

// The n-th call from now of the entry point, with or without the suffix _v2, returns the result. One
// that would kill the context (214, 700, 702, 714 to 719) does.
void mock_fail(const char* name, int n, int result) {
    std::lock_guard<std::mutex> l(state().lock);
    state().failures[mock::plain(name)] = {n, result};
}
// The device is gone: every call returns the result, 719 or 999 for example.
void mock_device_lost(int result) {
    std::lock_guard<std::mutex> l(state().lock);
    mock::fail(result, "device lost, as asked");
}
// As if the process had started again, for what errors and faults are concerned. Queued work is
// forgotten; memory, modules and handles stay.
void mock_reset(void) {
    auto& s = state();
    std::lock_guard<std::mutex> l(s.lock);
    s.sticky = CUDA_SUCCESS;
    s.lastError.clear();
    s.failures.clear();
    s.dropWaitIn = 0;
    s.null->work.clear();
    s.orphans.clear();
    for (auto& [st, keep] : s.streams) st->work.clear();
    for (auto& [e, keep] : s.events) e->record.reset();
}
void mock_set_memory(size_t bytes) {
    std::lock_guard<std::mutex> l(state().lock);
    state().memory->capacity = bytes;
}
// Blocks and warps in an order drawn from the seed; 0: in their natural order.
void mock_seed(uint64_t seed) {
    std::lock_guard<std::mutex> l(state().lock);
    state().settings.seed = seed;
}
// The n-th cuStreamWaitEvent from now does nothing, and says that it succeeded.
void mock_drop_wait(int n) {
    std::lock_guard<std::mutex> l(state().lock);
    state().dropWaitIn = n;
}
// Launches that take more lane-instructions end with LAUNCH_TIMEOUT.
void mock_set_max_instructions(uint64_t n) {
    std::lock_guard<std::mutex> l(state().lock);
    state().settings.maxLaneInstructions = n;
}
// Modules loaded from now on lack the n-th barrier (of a block or a warp), cp.async wait or fence of the
// kernel, in the order of its text. 0: nothing is left out.
void mock_drop_sync(const char* kernel, int n) {
    std::lock_guard<std::mutex> l(state().lock);
    state().dropSyncOf = kernel;
    state().dropSync = n;
}
// "races", "undefined", "shuffle_orders", "strict_free", "stalled", to 0 or 1. Returns whether there is such a check.
int mock_set(const char* what, int on) {
    auto& s = state();
    std::lock_guard<std::mutex> l(s.lock);
    std::string w = what;
    bool* where = w == "races" ? &s.settings.checkRaces : w == "undefined" ? &s.settings.checkUndefined
        : w == "shuffle_orders" ? &s.settings.shuffleOrders : w == "strict_free" ? &s.strictFree
        : w == "stalled" ? &s.stalled : nullptr;
    if (where) *where = on;
    s.changed.notify_all();
    return where != nullptr;
}
// As if memory had failed: flips a bit of n bytes, counted from the lowest of the first, wherever they lie in device memory. Returns in
// how many places they did. What is queued has not happened yet.
int mock_flip(const void* bytes, size_t n, size_t bit) {
    std::lock_guard<std::mutex> l(state().lock);
    return bit / 8 < n ? state().memory->flip(static_cast<const uint8_t*>(bytes), n, bit) : 0;
}
// The text of the last error, cut to n bytes with its end. Returns its length.
size_t mock_last_error(char* out, size_t n) {
    std::lock_guard<std::mutex> l(state().lock);
    const std::string& e = state().lastError;
    if (n) {
        size_t k = std::min(n - 1, e.size());
        std::memcpy(out, e.data(), k);
        out[k] = 0;
    }
    return e.size();
}
// Bytes of asynchronous copies whose host memory is not pinned: a driver copies these once more.
uint64_t mock_pageable_bytes(void) {
    std::lock_guard<std::mutex> l(state().lock);
    return state().pageableBytes;
}
// How often the entry point was called.
uint64_t mock_calls(const char* name) {
    std::lock_guard<std::mutex> l(state().lock);
    return state().calls[mock::plain(name)];
}
// A counter of a kernel, or of all (kernel null or empty). Names as in mock_report.
uint64_t mock_counter(const char* kernel, const char* counter) {
    auto& s = state();
    std::lock_guard<std::mutex> l(s.lock);
    uint64_t sum = 0;
    for (auto& [name, c] : s.counters)
        if (!kernel || !*kernel || name == kernel)
            for (auto& [k, v] : c.named())
                if (!std::strcmp(k, counter)) sum += v;
    return sum;
}
void mock_clear_counters(void) {
    std::lock_guard<std::mutex> l(state().lock);
    state().counters.clear();
    state().calls.clear();
}
// All counters as lines "kernel counter value", cut to n bytes. Returns the length.
size_t mock_report(char* out, size_t n) {
    auto& s = state();
    std::lock_guard<std::mutex> l(s.lock);
    std::string r;
    for (auto& [name, c] : s.counters)
        for (auto& [k, v] : c.named()) r += name + " " + k + " " + std::to_string(v) + "\n";
    if (n) {
        size_t k = std::min(n - 1, r.size());
        std::memcpy(out, r.data(), k);
        out[k] = 0;
    }
    return r.size();
}

}  // extern "C"
