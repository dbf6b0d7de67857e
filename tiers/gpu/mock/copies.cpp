// Entry points of the driver API about memory: allocation, pinning, copies, fills.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "state.h"

using namespace mock;

static ptx::Allocation* hold(CUdeviceptr a, size_t n) { return state().memory->find(a, n); }

// The host's end of a copy. Registered memory is copied as it is, other memory by way of the driver's own, which is slow: so it is counted.
enum class HostEnd { pinned, pageable, wrong };
static HostEnd hostEnd(const void* p, size_t n) {
    uint64_t a = reinterpret_cast<uint64_t>(p);
    if (auto* al = hold(a, n)) return al->defined ? HostEnd::wrong : HostEnd::pinned;
    if (state().memory->overlaps(a, n)) return HostEnd::wrong;  // beyond the end of what is registered
    state().pageableBytes += n;
    return HostEnd::pageable;
}
static void stillPinned(HostEnd was, const void* p, size_t n) {
    if (was == HostEnd::pinned && !hold(reinterpret_cast<uint64_t>(p), n))
        throw ptx::Fault(ptx::launchFailed, "pinned host memory was freed or unregistered while a copy of it was queued");
}
static bool mapped(const void* p, size_t n) {
    auto a = reinterpret_cast<uintptr_t>(p), page = a & ~uintptr_t(4095);
    std::vector<unsigned char> in((a + n - page + 4095) / 4096);
    return !mincore(reinterpret_cast<void*>(page), a + n - page, in.data());
}

// At run time a range may have been freed since the call.
static ptx::Allocation& range(CUdeviceptr a, size_t n, const char* what) {
    auto* al = hold(a, n);
    if (!al) throw ptx::Fault(ptx::illegalAddress, std::string(what) + ": " + state().memory->explain(a, n));
    return *al;
}

static void fill(CUdeviceptr to, uint32_t value, size_t width, size_t count) {
    auto& al = range(to, width * count, "memset");
    uint8_t* p = al.data + (to - al.base);
    for (size_t i = 0; i < count; i++) std::memcpy(p + i * width, &value, width);
    if (al.defined) std::memset(al.defined + (to - al.base), 1, width * count);
}
static void toDevice(CUdeviceptr to, const void* from, size_t n) {
    auto& al = range(to, n, "copy to the device");
    std::memcpy(al.data + (to - al.base), from, n);
    if (al.defined) std::memset(al.defined + (to - al.base), 1, n);
}
static void toHost(void* to, CUdeviceptr from, size_t n) {
    auto& al = range(from, n, "copy to the host");
    const uint8_t* d = al.defined ? al.defined + (from - al.base) : nullptr;
    if (d && state().settings.checkUndefined) {
        size_t i = size_t(static_cast<const uint8_t*>(n ? std::memchr(d, 0, n) : nullptr) - d);
        if (n && std::memchr(d, 0, n))
            throw ptx::Fault(ptx::launchFailed, ptx::format("copy of %zu bytes at 0x%llx to the host: byte %zu, at offset %llu of the allocation, was never written, or is computed from what was not",
                n, from, i, from + i - al.base));
    }
    std::memcpy(to, al.data + (from - al.base), n);
}
static void within(CUdeviceptr to, CUdeviceptr from, size_t n) {
    auto &t = range(to, n, "copy"), &f = range(from, n, "copy");
    std::memmove(t.data + (to - t.base), f.data + (from - f.base), n);
    if (!t.defined) return;
    if (f.defined) std::memmove(t.defined + (to - t.base), f.defined + (from - f.base), n);
    else std::memset(t.defined + (to - t.base), 1, n);
}

template <class F>
static void guarded(F f) {
    if (state().sticky) return;
    try {
        f();
    } catch (ptx::Fault& e) {
        fail(e.code, e.what());
    }
}
template <class F>
static CUresult queue(void* stream, F f) {
    Stream* st = known(stream);
    if (!st) return CUDA_ERROR_INVALID_HANDLE;
    enqueue(st, [f] { guarded(f); });
    return CUDA_SUCCESS;
}
template <class F>
static CUresult atOnce(std::unique_lock<std::mutex>& lock, F f) {
    joinDefault(lock);
    guarded(f);
    return state().sticky;
}
// Nothing to do for no bytes; nothing to be done where they are not.
#define DEMAND(a, n) do { \
        size_t bytes = n; \
        if (bytes == 0) return CUDA_SUCCESS; \
        if (!hold(a, bytes)) return CUDA_ERROR_INVALID_VALUE; \
    } while (0)

namespace mock {
bool freeDevice(uint64_t base) {
    forgetExported(base);
    state().owners.erase(base);
    return state().memory->release(base);
}
bool freeHost(void* p) {
    State& s = state();
    auto i = s.pinned.find(reinterpret_cast<uint64_t>(p));
    if (i == s.pinned.end()) return false;
    s.owners.erase(i->first);
    s.memory->dropHost(p);
    munmap(p, i->second);
    s.pinned.erase(i);
    return true;
}
}  // namespace mock

extern "C" {

CUresult cuMemGetInfo_v2(size_t* free, size_t* total) {
    ENTER(cuMemGetInfo_v2);
    auto& m = *state().memory;
    *free = m.capacity > m.used() ? m.capacity - m.used() : 0;
    *total = m.capacity;
    return CUDA_SUCCESS;
}
CUresult cuMemAlloc_v2(CUdeviceptr* out, size_t n) {
    ENTER(cuMemAlloc_v2);
    if (!n) return CUDA_ERROR_INVALID_VALUE;
    *out = state().memory->allocate(n);
    if (*out) state().owners[*out] = current();
    return *out ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult cuMemFree_v2(CUdeviceptr a) {
    ENTER_TO_END(cuMemFree_v2);
    if (!a) return CUDA_SUCCESS;
    beforeFree(entry.lock);
    return freeDevice(a) ? state().sticky : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* n, CUdeviceptr a) {
    ENTER(cuMemGetAddressRange_v2);
    auto* al = hold(a, 1);
    if (!al) return CUDA_ERROR_NOT_FOUND;
    if (base) *base = al->base;
    if (n) *n = al->size;
    return CUDA_SUCCESS;
}

// ---- host memory ----
CUresult cuMemHostAlloc(void** out, size_t n, unsigned) {
    ENTER(cuMemHostAlloc);
    if (!n) return CUDA_ERROR_INVALID_VALUE;
    void* p = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    state().pinned[reinterpret_cast<uint64_t>(p)] = n;
    state().memory->adoptHost(p, n);
    state().owners[reinterpret_cast<uint64_t>(p)] = current();
    *out = p;
    return CUDA_SUCCESS;
}
CUresult cuMemFreeHost(void* p) {
    ENTER_TO_END(cuMemFreeHost);
    if (!state().pinned.count(reinterpret_cast<uint64_t>(p))) return CUDA_ERROR_INVALID_VALUE;
    beforeFree(entry.lock);
    freeHost(p);
    return state().sticky;
}
CUresult cuMemHostRegister_v2(void* p, size_t n, unsigned) {
    ENTER(cuMemHostRegister_v2);
    if (!p || !n) return CUDA_ERROR_INVALID_VALUE;
    uint64_t a = reinterpret_cast<uint64_t>(p);
    if (a + n < a || !mapped(p, n)) return CUDA_ERROR_INVALID_VALUE;
    if (state().memory->overlaps(a, n)) return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
    state().memory->adoptHost(p, n);
    return CUDA_SUCCESS;
}
CUresult cuMemHostUnregister(void* p) {
    ENTER_TO_END(cuMemHostUnregister);
    State& s = state();
    if (s.pinned.count(reinterpret_cast<uint64_t>(p))) return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
    auto* al = s.memory->starting(reinterpret_cast<uint64_t>(p));
    if (!al || al->defined) return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
    beforeFree(entry.lock);
    if (!mapped(p, al->size)) fail(ptx::launchFailed, "registered host memory was unmapped before it was unregistered");
    s.memory->dropHost(p);
    return s.sticky;
}
CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* out, void* p, unsigned flags) {
    ENTER(cuMemHostGetDevicePointer_v2);
    uint64_t a = reinterpret_cast<uint64_t>(p);
    auto* al = hold(a, 1);
    if (!al || al->defined || flags) return CUDA_ERROR_INVALID_VALUE;
    *out = a;
    return CUDA_SUCCESS;
}
CUresult cuMemHostGetFlags(unsigned* flags, void* p) {
    ENTER(cuMemHostGetFlags);
    auto* al = hold(reinterpret_cast<uint64_t>(p), 1);
    if (!al || al->defined) return CUDA_ERROR_INVALID_VALUE;
    *flags = 3;
    return CUDA_SUCCESS;
}

// ---- copies. Host memory is read and written when the copy runs ----
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t n, void* stream) {
    ENTER(cuMemcpyHtoDAsync_v2);
    DEMAND(to, n);
    HostEnd end = hostEnd(from, n);
    if (end == HostEnd::wrong) return CUDA_ERROR_INVALID_VALUE;
    return queue(stream, [=] { stillPinned(end, from, n); toDevice(to, from, n); });
}
CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t n, void* stream) {
    ENTER(cuMemcpyDtoHAsync_v2);
    DEMAND(from, n);
    HostEnd end = hostEnd(to, n);
    if (end == HostEnd::wrong) return CUDA_ERROR_INVALID_VALUE;
    return queue(stream, [=] { stillPinned(end, to, n); toHost(to, from, n); });
}
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t n, void* stream) {
    ENTER(cuMemcpyDtoDAsync_v2);
    DEMAND(to, n);
    DEMAND(from, n);
    return queue(stream, [=] { within(to, from, n); });
}
CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t n) {
    ENTER(cuMemcpyHtoD_v2);
    DEMAND(to, n);
    return atOnce(entry.lock, [=] { toDevice(to, from, n); });
}
CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t n) {
    ENTER(cuMemcpyDtoH_v2);
    DEMAND(from, n);
    return atOnce(entry.lock, [=] { toHost(to, from, n); });
}
CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t n) {
    ENTER(cuMemcpyDtoD_v2);
    DEMAND(to, n);
    DEMAND(from, n);
    return atOnce(entry.lock, [=] { within(to, from, n); });
}

static void anywhere(CUdeviceptr to, CUdeviceptr from, size_t n) {
    bool toDev = hold(to, n), fromDev = hold(from, n);
    void* host = reinterpret_cast<void*>(to);
    if (toDev && fromDev) within(to, from, n);
    else if (toDev) toDevice(to, reinterpret_cast<const void*>(from), n);
    else if (fromDev) toHost(host, from, n);
    else std::memmove(host, reinterpret_cast<const void*>(from), n);
}
CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t n) {
    ENTER(cuMemcpy);
    return atOnce(entry.lock, [=] { anywhere(to, from, n); });
}
CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t n, void* stream) {
    ENTER(cuMemcpyAsync);
    return queue(stream, [=] { anywhere(to, from, n); });
}

// ---- fills: asynchronous to the host even where their name does not say so ----
CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char v, size_t n, void* stream) {
    ENTER(cuMemsetD8Async);
    DEMAND(to, n);
    return queue(stream, [=] { fill(to, v, 1, n); });
}
CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char v, size_t n) {
    ENTER(cuMemsetD8_v2);
    DEMAND(to, n);
    return queue(nullptr, [=] { fill(to, v, 1, n); });
}
CUresult cuMemsetD16Async(CUdeviceptr to, unsigned short v, size_t n, void* stream) {
    ENTER(cuMemsetD16Async);
    DEMAND(to, 2 * n);
    return queue(stream, [=] { fill(to, v, 2, n); });
}
CUresult cuMemsetD16_v2(CUdeviceptr to, unsigned short v, size_t n) {
    ENTER(cuMemsetD16_v2);
    DEMAND(to, 2 * n);
    return queue(nullptr, [=] { fill(to, v, 2, n); });
}
CUresult cuMemsetD32Async(CUdeviceptr to, unsigned v, size_t n, void* stream) {
    ENTER(cuMemsetD32Async);
    DEMAND(to, 4 * n);
    return queue(stream, [=] { fill(to, v, 4, n); });
}
CUresult cuMemsetD32_v2(CUdeviceptr to, unsigned v, size_t n) {
    ENTER(cuMemsetD32_v2);
    DEMAND(to, 4 * n);
    return queue(nullptr, [=] { fill(to, v, 4, n); });
}

}  // extern "C"
