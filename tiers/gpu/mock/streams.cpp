// Lazy streams. Nothing runs until somebody waits: so work that a program forgot to wait for has not
// happened when its result is used, and every such mistake shows in every run.
#include <algorithm>
#include <chrono>

#include "state.h"

namespace mock {

double now() {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

Stream* known(void* handle) {
    State& s = state();
    if (reinterpret_cast<uintptr_t>(handle) <= 2) return s.null.get();
    auto i = s.streams.find(static_cast<Stream*>(handle));
    return i == s.streams.end() ? nullptr : i->second.get();
}

static std::shared_ptr<Stream> shared(Stream* st) {
    State& s = state();
    return st == s.null.get() ? s.null : s.streams.at(st);
}

static std::shared_ptr<Record> markAlone(Stream* st) {
    auto r = std::make_shared<Record>();
    r->on = shared(st);
    st->work.push_back([r] {
        r->done = true;
        r->milliseconds = now();
        r->on.reset();
    });
    return r;
}

static thread_local std::unique_lock<std::mutex>* heldLock;

static void awaitAlone(Stream* st, std::shared_ptr<Record> r) {
    if (r->done) return;
    st->work.push_back([r] {
        if (!r->done) runUntil(*heldLock, r->on, r);
    });
}

// The default stream and the blocking ones wait for each other.
static void order(Stream* st) {
    State& s = state();
    if (st != s.null.get()) {
        if (st->blocking && !s.null->work.empty()) awaitAlone(st, markAlone(s.null.get()));
        return;
    }
    for (auto& [other, keep] : s.streams)
        if (other->blocking && !other->work.empty()) awaitAlone(st, markAlone(other));
}

void enqueue(Stream* st, std::function<void()> f) {
    order(st);
    st->work.push_back(std::move(f));
}

std::shared_ptr<Record> mark(Stream* st) {
    order(st);
    return markAlone(st);
}

void await(Stream* st, std::shared_ptr<Record> r) {
    order(st);
    awaitAlone(st, std::move(r));
}

static bool stepShared(std::unique_lock<std::mutex>& lock, std::shared_ptr<Stream> st) {
    while (st->busy || (state().stalled && !st->work.empty())) state().changed.wait(lock);
    if (st->work.empty()) return false;
    auto f = std::move(st->work.front());
    st->work.pop_front();
    st->busy = true;
    auto outer = heldLock;
    heldLock = &lock;
    f();
    heldLock = outer;
    st->busy = false;
    state().changed.notify_all();
    return true;
}

bool step(std::unique_lock<std::mutex>& lock, Stream* st) { return stepShared(lock, shared(st)); }

void runUntil(std::unique_lock<std::mutex>& lock, std::shared_ptr<Stream> st, const std::shared_ptr<Record>& r) {
    while (!r->done && stepShared(lock, st)) {}
}

void drain(std::unique_lock<std::mutex>& lock, Stream* st) {
    if (st->work.empty() && !st->busy) return;
    // Only what is queued now: others may go on adding.
    auto r = markAlone(st);
    runUntil(lock, r->on, r);
}

void drainAll(std::unique_lock<std::mutex>& lock) {
    State& s = state();
    drain(lock, s.null.get());
    std::vector<std::shared_ptr<Stream>> all = std::move(s.orphans);
    s.orphans.clear();
    for (auto& [st, keep] : s.streams) all.push_back(keep);
    for (auto& st : all)
        while (stepShared(lock, st)) {}
}

// A device that is stuck keeps who frees memory, if anything is queued.
void beforeFree(std::unique_lock<std::mutex>& lock) {
    State& s = state();
    if (!s.strictFree) return drainAll(lock);
    auto working = [&s] {
        for (auto& [st, keep] : s.streams)
            if (!st->work.empty()) return true;
        return !s.null->work.empty() || !s.orphans.empty();
    };
    while (s.stalled && working()) s.changed.wait(lock);
}

void joinDefault(std::unique_lock<std::mutex>& lock) {
    State& s = state();
    std::vector<std::shared_ptr<Stream>> all;
    for (auto& [st, keep] : s.streams)
        if (st->blocking) all.push_back(keep);
    for (auto& st : all)
        while (stepShared(lock, st)) {}
    drain(lock, s.null.get());
}

void callHost(void (*f)(void*), void* p) {
    heldLock->unlock();
    f(p);
    heldLock->lock();
}

}  // namespace mock
