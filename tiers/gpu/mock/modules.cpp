// Entry points of the driver API about modules and functions.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "state.h"

using namespace mock;

namespace mock {
void unload(Module* m) {
    State& s = state();
    for (auto& [name, f] : m->functions) s.functions.erase(f.get());
    for (uint64_t a : m->placed) s.memory->release(a);
    s.modules.erase(m);
}
}  // namespace mock

extern "C" {

// ---- modules ----
struct InDeviceMemory : ptx::Placer {
    std::vector<uint64_t> placed;
    uint64_t place(const ptx::Variable& v) override {
        auto& m = *state().memory;
        uint64_t a = m.allocate(std::max<uint32_t>(v.size, 1));
        if (!a) throw std::bad_alloc();
        placed.push_back(a);
        auto* al = m.starting(a);
        std::memcpy(al->data, v.init.data(), v.size);
        std::memset(al->defined, 1, v.size);
        return a;
    }
};

// Leaves out one barrier, wait or fence, for tests that want to see it missed.
static void dropSynchronisation(ptx::Module& m) {
    State& s = state();
    auto k = m.kernels.find(s.dropSyncOf);
    if (!s.dropSync || k == m.kernels.end()) return;
    int n = 0;
    for (auto& i : k->second->code) {
        bool is = i.kind == ptx::Kind::warpBarrier || i.kind == ptx::Kind::waitGroup || i.kind == ptx::Kind::fence ||
                  (i.kind == ptx::Kind::blockBarrier && !i.nd);
        if (!is || ++n != s.dropSync) continue;
        say("left out of kernel " + s.dropSyncOf + ": line " + std::to_string(i.line) + ": " + i.text);
        i.kind = ptx::Kind::prefetch;
        return;
    }
    say("kernel " + s.dropSyncOf + " has only " + std::to_string(n) + " synchronisations");
}

static CUresult load(Module** out, const void* image, unsigned n, int* options, void** values) {
    const char* text = static_cast<const char*>(image);
    if (!text || !*text || uint8_t(*text) >= 0x80 || !std::strncmp(text, "\177ELF", 4)) return CUDA_ERROR_INVALID_IMAGE;
    InDeviceMemory placer;
    try {
        auto m = std::make_unique<Module>();
        m->code = ptx::parse(text, &placer);
        m->placed = placer.placed;
        dropSynchronisation(*m->code);
        m->owner = current();
        *out = m.get();
        state().modules[*out] = std::move(m);
        return CUDA_SUCCESS;
    } catch (std::bad_alloc&) {
        for (uint64_t a : placer.placed) state().memory->release(a);
        return CUDA_ERROR_OUT_OF_MEMORY;
    } catch (std::exception& e) {
        for (uint64_t a : placer.placed) state().memory->release(a);
        say(std::string("PTX refused:\n") + e.what());
        char* log = nullptr;
        size_t room = 0;
        for (unsigned i = 0; i < n; i++) {
            if (options[i] == 5) log = static_cast<char*>(values[i]);                     // CU_JIT_ERROR_LOG_BUFFER
            if (options[i] == 6) room = size_t(reinterpret_cast<uintptr_t>(values[i]));    // ..._SIZE_BYTES
        }
        if (log && room) {
            std::strncpy(log, e.what(), room);
            log[room - 1] = 0;
        }
        return CUDA_ERROR_INVALID_PTX;
    }
}
CUresult cuModuleLoadDataEx(Module** m, const void* image, unsigned n, int* options, void** values) {
    ENTER(cuModuleLoadDataEx);
    return load(m, image, n, options, values);
}
CUresult cuModuleLoadData(Module** m, const void* image) {
    ENTER(cuModuleLoadData);
    return load(m, image, 0, nullptr, nullptr);
}
CUresult cuModuleUnload(Module* m) {
    ENTER_TO_END(cuModuleUnload);
    State& s = state();
    if (!s.modules.count(m)) return CUDA_ERROR_INVALID_HANDLE;
    drainAll(entry.lock);
    unload(m);
    return s.sticky;
}
CUresult cuModuleGetFunction(Function** out, Module* m, const char* name) {
    ENTER(cuModuleGetFunction);
    State& s = state();
    if (!s.modules.count(m)) return CUDA_ERROR_INVALID_HANDLE;
    auto k = m->code->kernels.find(name);
    if (k == m->code->kernels.end()) return CUDA_ERROR_NOT_FOUND;
    auto& f = m->functions[name];
    if (!f) f = std::make_unique<Function>(Function{k->second, (48 << 10) - int(k->second->sharedBytes)});
    s.functions.insert(f.get());
    *out = f.get();
    return CUDA_SUCCESS;
}
CUresult cuModuleGetGlobal_v2(CUdeviceptr* a, size_t* bytes, Module* m, const char* name) {
    ENTER(cuModuleGetGlobal_v2);
    if (!state().modules.count(m)) return CUDA_ERROR_INVALID_HANDLE;
    auto v = m->code->variables.find(name);
    if (v == m->code->variables.end()) return CUDA_ERROR_NOT_FOUND;
    if (a) *a = v->second.address;
    if (bytes) *bytes = v->second.size;
    return CUDA_SUCCESS;
}

// ---- functions ----
static int registersOf(const ptx::Kernel& k) { return std::min(255, std::max(16, int(k.registers / 4))); }

CUresult cuFuncGetAttribute(int* v, int attribute, Function* f) {
    ENTER(cuFuncGetAttribute);
    if (!state().functions.count(f)) return CUDA_ERROR_INVALID_HANDLE;
    const ptx::Kernel& k = *f->kernel;
    switch (attribute) {
        case 0: *v = threadsLimit(k); break;
        case 1: *v = int(k.sharedBytes); break;
        case 2: case 3: *v = 0; break;
        case 4: *v = registersOf(k); break;
        case 5: case 6: *v = 80; break;
        case 7: *v = 0; break;
        case 8: *v = f->maxDynamicShared; break;
        case 9: *v = -1; break;
        default: return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(Function* f, int attribute, int v) {
    ENTER(cuFuncSetAttribute);
    if (!state().functions.count(f)) return CUDA_ERROR_INVALID_HANDLE;
    if (attribute == 9) return v < -1 || v > 100 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
    if (attribute != 8 || v < 0 || v + int(f->kernel->sharedBytes) > 227 << 10) return CUDA_ERROR_INVALID_VALUE;
    f->maxDynamicShared = v;
    return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(Function*, int) {
    ENTER(cuFuncSetCacheConfig);
    return CUDA_SUCCESS;
}
static CUresult occupancy(int* n, Function* f, int threads, size_t dynamic) {
    if (!state().functions.count(f)) return CUDA_ERROR_INVALID_HANDLE;
    if (threads < 1) return CUDA_ERROR_INVALID_VALUE;
    size_t shared = f->kernel->sharedBytes + dynamic + 1024;
    int warps = (threads + 31) / 32;
    *n = threads > threadsLimit(*f->kernel) || int(dynamic) > f->maxDynamicShared ? 0
        : std::min({64 / warps, 32, int((228u << 10) / shared), 65536 / (registersOf(*f->kernel) * warps * 32)});
    return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, Function* f, int threads, size_t dynamic) {
    ENTER(cuOccupancyMaxActiveBlocksPerMultiprocessor);
    return occupancy(n, f, threads, dynamic);
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, Function* f, int threads, size_t dynamic, unsigned) {
    ENTER(cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags);
    return occupancy(n, f, threads, dynamic);
}

}  // extern "C"
