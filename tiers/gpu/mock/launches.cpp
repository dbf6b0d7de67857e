// Entry points of the driver API about launches, streams and events.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "state.h"

using namespace mock;

extern "C" {

// ---- launches ----
CUresult cuLaunchKernel(Function* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned dynamic, void* stream, void** args, void** extra) {
    ENTER(cuLaunchKernel);
    State& s = state();
    Stream* st = known(stream);
    if (!st || !s.functions.count(f)) return CUDA_ERROR_INVALID_HANDLE;
    auto k = f->kernel;
    uint64_t threads = uint64_t(bx) * by * bz;
    if (!gx || !gy || !gz || gx > 2147483647u || gy > 65535 || gz > 65535 || !threads || bx > 1024 || by > 1024 || bz > 64 ||
        threads > 1024 || threads > uint64_t(threadsLimit(*k)) || (k->reqThreads && threads != k->reqThreads) || int(dynamic) > f->maxDynamicShared)
        return CUDA_ERROR_INVALID_VALUE;
    if (extra) return CUDA_ERROR_NOT_SUPPORTED;
    if (!args && !k->params.empty()) return CUDA_ERROR_INVALID_VALUE;
    auto params = std::make_shared<std::vector<uint8_t>>(k->paramBytes);
    for (size_t i = 0; i < k->params.size(); i++) std::memcpy(params->data() + k->params[i].offset, args[i], k->params[i].size);
    ptx::LaunchConfig config = s.settings;
    config.grid = {gx, gy, gz};
    config.block = {bx, by, bz};
    config.dynamicShared = dynamic;
    enqueue(st, [=, &s] {
        if (s.sticky) return;
        ptx::Counters count;
        try {
            ptx::run(*k, config, params->data(), *s.memory, count);
        } catch (ptx::Fault& e) {
            fail(e.code, e.what());
        }
        s.counters[k->name].add(count);
        if (!s.log) return;
        std::fprintf(s.log, "%s <<<%u,%u,%u; %u,%u,%u; %u>>>", k->name.c_str(), gx, gy, gz, bx, by, bz, dynamic);
        for (auto& [name, value] : count.named())
            if (value) std::fprintf(s.log, " %s %lu", name, value);
        std::fprintf(s.log, "\n");
        std::fflush(s.log);
    });
    return CUDA_SUCCESS;
}
CUresult cuLaunchHostFunc(void* stream, void (*f)(void*), void* p) {
    ENTER(cuLaunchHostFunc);
    Stream* st = known(stream);
    if (!st || !f) return st ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_INVALID_HANDLE;
    enqueue(st, [=] {
        if (!state().sticky) callHost(f, p);
    });
    return CUDA_SUCCESS;
}

// ---- streams ----
static CUresult makeStream(Stream** out, unsigned flags, int priority) {
    if (flags > 1) return CUDA_ERROR_INVALID_VALUE;
    auto st = std::make_shared<Stream>();
    st->flags = flags;
    st->blocking = !flags;
    st->priority = priority;
    st->owner = current();
    *out = st.get();
    state().streams[st.get()] = st;
    return CUDA_SUCCESS;
}
CUresult cuStreamCreate(Stream** out, unsigned flags) {
    ENTER(cuStreamCreate);
    return makeStream(out, flags, 0);
}
CUresult cuStreamCreateWithPriority(Stream** out, unsigned flags, int priority) {
    ENTER(cuStreamCreateWithPriority);
    return makeStream(out, flags, std::clamp(priority, -5, 0));
}
CUresult cuStreamDestroy_v2(Stream* stream) {
    ENTER_TO_END(cuStreamDestroy_v2);
    State& s = state();
    auto i = s.streams.find(stream);
    if (i == s.streams.end()) return CUDA_ERROR_INVALID_HANDLE;
    if (!stream->work.empty()) s.orphans.push_back(i->second);  // its work is still done, some time
    s.streams.erase(i);
    return s.sticky;
}
CUresult cuStreamGetFlags(void* stream, unsigned* flags) {
    ENTER(cuStreamGetFlags);
    Stream* st = known(stream);
    if (!st) return CUDA_ERROR_INVALID_HANDLE;
    *flags = st->flags;
    return CUDA_SUCCESS;
}
CUresult cuStreamGetPriority(void* stream, int* priority) {
    ENTER(cuStreamGetPriority);
    Stream* st = known(stream);
    if (!st) return CUDA_ERROR_INVALID_HANDLE;
    *priority = st->priority;
    return CUDA_SUCCESS;
}
CUresult cuStreamSynchronize(void* stream) {
    ENTER(cuStreamSynchronize);
    Stream* st = known(stream);
    if (!st) return CUDA_ERROR_INVALID_HANDLE;
    if (st == state().null.get()) joinDefault(entry.lock);
    else drain(entry.lock, st);
    return state().sticky;
}
// Each question lets one piece of work run, so that who polls gets there.
CUresult cuStreamQuery(void* stream) {
    ENTER(cuStreamQuery);
    Stream* st = known(stream);
    if (!st) return CUDA_ERROR_INVALID_HANDLE;
    if (state().stalled) return st->work.empty() ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
    bool worked = step(entry.lock, st);
    return state().sticky ? state().sticky : worked ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS;
}
CUresult cuStreamWaitEvent(void* stream, Event* e, unsigned) {
    ENTER(cuStreamWaitEvent);
    State& s = state();
    Stream* st = known(stream);
    if (!st || !s.events.count(e)) return CUDA_ERROR_INVALID_HANDLE;
    if (s.dropWaitIn && !--s.dropWaitIn) return CUDA_SUCCESS;
    if (e->record) await(st, e->record);
    return CUDA_SUCCESS;
}

// ---- events ----
CUresult cuEventCreate(Event** out, unsigned flags) {
    ENTER(cuEventCreate);
    auto e = std::make_unique<Event>();
    e->flags = flags;
    e->owner = current();
    *out = e.get();
    state().events[*out] = std::move(e);
    return CUDA_SUCCESS;
}
CUresult cuEventDestroy_v2(Event* e) {
    ENTER_TO_END(cuEventDestroy_v2);
    return state().events.erase(e) ? state().sticky : CUDA_ERROR_INVALID_HANDLE;
}
CUresult cuEventRecord(Event* e, void* stream) {
    ENTER(cuEventRecord);
    Stream* st = known(stream);
    if (!st || !state().events.count(e)) return CUDA_ERROR_INVALID_HANDLE;
    e->record = mark(st);
    return CUDA_SUCCESS;
}
CUresult cuEventSynchronize(Event* e) {
    ENTER(cuEventSynchronize);
    if (!state().events.count(e)) return CUDA_ERROR_INVALID_HANDLE;
    auto r = e->record;
    if (r && !r->done) runUntil(entry.lock, r->on, r);
    return state().sticky;
}
CUresult cuEventQuery(Event* e) {
    ENTER(cuEventQuery);
    if (!state().events.count(e)) return CUDA_ERROR_INVALID_HANDLE;
    auto r = e->record;
    if (!r || r->done) return CUDA_SUCCESS;
    if (state().stalled) return CUDA_ERROR_NOT_READY;
    Stream* st = r->on.get();
    auto keep = r->on;
    if (state().streams.count(st) || st == state().null.get()) step(entry.lock, st);
    else runUntil(entry.lock, keep, r);
    return state().sticky ? state().sticky : CUDA_ERROR_NOT_READY;
}
CUresult cuEventElapsedTime(float* ms, Event* from, Event* to) {
    ENTER(cuEventElapsedTime);
    State& s = state();
    if (!s.events.count(from) || !s.events.count(to) || !from->record || !to->record || (from->flags | to->flags) & 2) return CUDA_ERROR_INVALID_HANDLE;
    if (!from->record->done || !to->record->done) return CUDA_ERROR_NOT_READY;
    *ms = float(to->record->milliseconds - from->record->milliseconds);
    return CUDA_SUCCESS;
}

}  // extern "C"
