// Device memory: every allocation is mapped by itself, with a shadow, at an address that is never used
// again. So an access is right only if it lies in one live allocation, and stale pointers are found.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "machine.h"

namespace ptx {

std::string format(const char* f, ...) {
    char buf[1024];
    va_list args;
    va_start(args, f);
    vsnprintf(buf, sizeof buf, f, args);
    va_end(args);
    return buf;
}

template <class T>
static T* mapPages(uint64_t n) {
    void* p = mmap(nullptr, n * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? nullptr : static_cast<T*>(p);
}

static constexpr uint64_t granule = 512;
static uint64_t rounded(uint64_t n) { return (n + granule - 1) / granule * granule; }

static void unmap(Allocation& a) {
    if (!a.defined) return;
    if (a.data) munmap(a.data, a.size);
    munmap(a.defined, a.size);
    if (a.writer) munmap(a.writer, a.size * 4);
    if (a.reader) munmap(a.reader, a.size * 4);
}

DeviceMemory::~DeviceMemory() {
    for (auto& [base, a] : live) unmap(*a);
}

uint64_t DeviceMemory::allocate(uint64_t size) {
    if (!size || rounded(size) < size || inUse + rounded(size) > capacity) return 0;
    auto a = std::make_unique<Allocation>();
    a->base = nextBase;
    a->size = size;
    a->defined = mapPages<uint8_t>(size);
    a->data = mapPages<uint8_t>(size);
    a->writer = mapPages<uint32_t>(size);
    a->reader = mapPages<uint32_t>(size);
    if (!a->data || !a->defined || !a->writer || !a->reader) return 0;
    inUse += rounded(size);
    nextBase += rounded(size) + granule;
    uint64_t base = a->base;
    live[base] = std::move(a);
    return base;
}

bool DeviceMemory::release(uint64_t base) {
    auto i = live.find(base);
    if (i == live.end() || !i->second->defined) return false;
    inUse -= rounded(i->second->size);
    freed[base] = i->second->size;
    if (freed.size() > 4096) freed.erase(freed.begin());
    unmap(*i->second);
    live.erase(i);
    return true;
}

void DeviceMemory::adoptHost(void* p, uint64_t size) {
    auto a = std::make_unique<Allocation>();
    a->base = reinterpret_cast<uint64_t>(p);
    a->size = size;
    a->data = static_cast<uint8_t*>(p);
    live[a->base] = std::move(a);
}

bool DeviceMemory::dropHost(void* p) {
    auto i = live.find(reinterpret_cast<uint64_t>(p));
    if (i == live.end() || i->second->defined) return false;
    live.erase(i);
    return true;
}

Allocation* DeviceMemory::find(uint64_t a, uint64_t n) {
    auto i = live.upper_bound(a);
    if (i == live.begin()) return nullptr;
    --i;
    return i->second->holds(a, n) ? i->second.get() : nullptr;
}

bool DeviceMemory::overlaps(uint64_t a, uint64_t n) const {
    auto i = live.lower_bound(a);
    if (i != live.end() && i->first - a < n) return true;
    return i != live.begin() && a - std::prev(i)->first < std::prev(i)->second->size;
}

Allocation* DeviceMemory::starting(uint64_t base) {
    auto i = live.find(base);
    return i == live.end() ? nullptr : i->second.get();
}

int DeviceMemory::flip(const uint8_t* bytes, size_t n, size_t bit) {
    int places = 0;
    for (auto& [base, a] : live) {
        uint8_t *at = a->data, *end = a->data + a->size;
        while (a->defined && n && (at = static_cast<uint8_t*>(memmem(at, size_t(end - at), bytes, n)))) {
            at[bit / 8] ^= uint8_t(1u << bit % 8);
            at += n;
            places++;
        }
    }
    return places;
}

std::string DeviceMemory::explain(uint64_t a, uint64_t n) const {
    auto f = freed.upper_bound(a);
    if (f != freed.begin() && (--f, a - f->first < f->second))
        return format("0x%lx lies in freed memory, %lu bytes into the %lu bytes at 0x%lx", a, a - f->first, f->second, f->first);
    auto i = live.upper_bound(a);
    const uint64_t near = 1u << 20;
    uint64_t before = i == live.end() ? near : i->second->base - a;
    if (i != live.begin()) {
        auto& b = *std::prev(i)->second;
        uint64_t into = a - b.base, past = into < b.size ? 0 : into - b.size;
        if (past < std::min(near, before))
            return format("0x%lx: bytes %lu to %lu of an allocation of %lu bytes at 0x%lx", a, into, into + n, b.size, b.base);
    }
    if (before < near) return format("0x%lx lies %lu bytes before the allocation at 0x%lx", a, before, i->second->base);
    return format("0x%lx lies in no allocation%s", a, a < 4096 ? " (a null pointer?)" : "");
}

void DeviceMemory::forgetAccesses() {
    for (auto& [base, a] : live)
        for (uint32_t* p : {a->writer, a->reader})
            if (p) madvise(p, a->size * 4, MADV_DONTNEED);
}

std::vector<std::pair<const char*, uint64_t>> Counters::named() const {
    return {{"launches", launches}, {"blocks", blocks}, {"warp_instructions", warpInstructions},
        {"lane_instructions", laneInstructions}, {"mma", mma}, {"barriers", barriers},
        {"global_load_bytes", globalLoad}, {"global_store_bytes", globalStore}, {"global_atomic_bytes", globalAtomic},
        {"global_requests", globalRequests}, {"global_sectors", globalSectors}, {"cp_async_bytes", copyAsync},
        {"shared_load_bytes", sharedLoad}, {"shared_store_bytes", sharedStore}, {"shared_atomic_bytes", sharedAtomic},
        {"shared_wavefronts", wavefronts}, {"shared_wavefronts_ideal", idealWavefronts}, {"param_load_bytes", paramLoad},
        {"host_microseconds", microseconds}};
}

void Counters::add(const Counters& other) {
    auto from = reinterpret_cast<const uint64_t*>(&other);
    auto to = reinterpret_cast<uint64_t*>(this);
    for (size_t i = 0; i < sizeof *this / sizeof *to; i++) to[i] += from[i];
}

uint32_t GlobalRaces::launchTag(DeviceMemory& memory) {
    static uint32_t launches = 0;
    launches = (launches + 1) & 2047;
    if (!launches) {
        memory.forgetAccesses();
        launches = 1;
    }
    return launches << 21;
}

}  // namespace ptx
