// Entry points of the driver API about the device, contexts, modules, launches, streams and events.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "state.h"

using namespace mock;

static const struct { CUresult code; const char *name, *text; } errors[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {4, "CUDA_ERROR_DEINITIALIZED", "driver shutting down"},
    {34, "CUDA_ERROR_STUB_LIBRARY", "stub library"},
    {46, "CUDA_ERROR_DEVICE_UNAVAILABLE", "device busy or unavailable"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {214, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"},
    {218, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "the provided PTX was compiled with an unsupported toolchain."},
    {301, "CUDA_ERROR_FILE_NOT_FOUND", "file not found"},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {702, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "part or all of the requested memory range is already mapped"},
    {713, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "pointer does not correspond to a registered memory region"},
    {714, "CUDA_ERROR_HARDWARE_STACK_ERROR", "hardware stack error"},
    {715, "CUDA_ERROR_ILLEGAL_INSTRUCTION", "an illegal instruction was encountered"},
    {716, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {717, "CUDA_ERROR_INVALID_ADDRESS_SPACE", "operation not supported on global/shared address space"},
    {718, "CUDA_ERROR_INVALID_PC", "invalid program counter"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {800, "CUDA_ERROR_NOT_PERMITTED", "operation not permitted"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

// What an H100 says, but for four multiprocessors: the occupancy that a planner sees stays small.
static const struct { int attribute, value; } attributes[] = {
    {1, 1024}, {2, 1024}, {3, 1024}, {4, 64},          // threads per block, block dimensions
    {5, 2147483647}, {6, 65535}, {7, 65535},           // grid dimensions
    {8, 48 << 10}, {9, 64 << 10}, {10, 32},            // shared per block, constant, warp size
    {11, 2147483647}, {12, 65536}, {13, 1980000},      // pitch, registers per block, clock in kHz
    {14, 512}, {15, 1}, {16, 4}, {17, 0}, {18, 0},     // texture alignment, overlap, multiprocessors, timeout, integrated
    {19, 1}, {20, 0}, {31, 1}, {32, 0},                // maps host memory, compute mode, concurrent kernels, ECC
    {33, 1}, {34, 0}, {35, 0},                         // PCI bus, device, TCC
    {36, 2619000}, {37, 5120}, {38, 50 << 20},         // memory clock, bus width, L2
    {39, 2048}, {40, 3}, {41, 1}, {50, 0},             // threads per multiprocessor, copy engines, unified addressing
    {75, 9}, {76, 0}, {78, 1}, {79, 1}, {80, 1},       // compute capability, priorities, caches
    {81, 228 << 10}, {82, 65536}, {83, 0}, {84, 0},    // shared and registers per multiprocessor, managed, multi-GPU board
    {86, 1}, {87, 64}, {88, 0}, {89, 0}, {90, 1},      // host atomics, FP64 ratio, pageable access, preemption
    {91, 1}, {95, 1}, {97, 227 << 10},                 // host pointers of registered memory, cooperative, opt-in shared
    {99, 1}, {100, 0}, {106, 32}, {108, 31 << 20},     // registering hosts, pageable tables, blocks per multiprocessor, L2 persistence
    {111, 1 << 10}, {114, 1}, {115, 1},                // reserved shared, read-only registering, memory pools
};

static bool noDevice() { return std::getenv("MOCKCUDA_NODEVICE") != nullptr; }

extern "C" {

CUresult cuInit(unsigned flags) {
    ENTER_ANY(cuInit);
    if (flags) return CUDA_ERROR_INVALID_VALUE;
    if (noDevice()) return CUDA_ERROR_NO_DEVICE;
    state().initialised = true;
    return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int* v) {
    ENTER_ANY(cuDriverGetVersion);
    *v = 12060;
    return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult e, const char** out) {
    for (auto& x : errors)
        if (x.code == e) return *out = x.name, CUDA_SUCCESS;
    *out = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}
CUresult cuGetErrorString(CUresult e, const char** out) {
    for (auto& x : errors)
        if (x.code == e) return *out = x.text, CUDA_SUCCESS;
    *out = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}

// ---- device ----
CUresult cuDeviceGetCount(int* n) {
    ENTER_ANY(cuDeviceGetCount);
    if (!state().initialised) return CUDA_ERROR_NOT_INITIALIZED;
    *n = 1;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* d, int ordinal) {
    ENTER_ANY(cuDeviceGet);
    if (!state().initialised) return CUDA_ERROR_NOT_INITIALIZED;
    if (ordinal) return CUDA_ERROR_INVALID_DEVICE;
    *d = 0;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetName(char* out, int n, CUdevice d) {
    ENTER_ANY(cuDeviceGetName);
    if (d || n < 1) return d ? CUDA_ERROR_INVALID_DEVICE : CUDA_ERROR_INVALID_VALUE;
    std::strncpy(out, "Mock PTX device", size_t(n));
    out[n - 1] = 0;
    return CUDA_SUCCESS;
}
CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice d) {
    ENTER_ANY(cuDeviceTotalMem_v2);
    if (d) return CUDA_ERROR_INVALID_DEVICE;
    *bytes = state().memory->capacity;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* v, int attribute, CUdevice d) {
    ENTER_ANY(cuDeviceGetAttribute);
    if (d) return CUDA_ERROR_INVALID_DEVICE;
    if (attribute < 1 || attribute > 200) return CUDA_ERROR_INVALID_VALUE;
    *v = 0;
    for (auto& a : attributes)
        if (a.attribute == attribute) *v = a.value;
    return CUDA_SUCCESS;
}
CUresult cuDeviceComputeCapability(int* major, int* minor, CUdevice d) {
    ENTER_ANY(cuDeviceComputeCapability);
    if (d) return CUDA_ERROR_INVALID_DEVICE;
    *major = 9;
    *minor = 0;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetUuid(unsigned char* uuid, CUdevice d) {
    ENTER_ANY(cuDeviceGetUuid);
    if (d) return CUDA_ERROR_INVALID_DEVICE;
    std::memcpy(uuid, "mock PTX device", 16);
    return CUDA_SUCCESS;
}
CUresult cuDeviceCanAccessPeer(int* can, CUdevice, CUdevice) {
    ENTER_ANY(cuDeviceCanAccessPeer);
    *can = 0;
    return CUDA_SUCCESS;
}

// ---- contexts ----
CUresult cuCtxCreate_v2(Context** out, unsigned flags, CUdevice d) {
    ENTER_DEVICE(cuCtxCreate_v2);
    if (d) return CUDA_ERROR_INVALID_DEVICE;
    auto* c = new Context{d, false, flags};
    state().contexts.insert(c);
    *out = current() = c;
    return CUDA_SUCCESS;
}
CUresult cuCtxDestroy_v2(Context* c) {
    ENTER_TO_END(cuCtxDestroy_v2);
    if (!state().contexts.count(c)) return CUDA_ERROR_INVALID_CONTEXT;
    drainAll(entry.lock);
    state().contexts.erase(c);
    if (current() == c) current() = nullptr;
    delete c;
    return state().sticky;
}
CUresult cuCtxSetCurrent(Context* c) {
    ENTER_DEVICE(cuCtxSetCurrent);
    if (c && c != &state().primary && !state().contexts.count(c)) return CUDA_ERROR_INVALID_CONTEXT;
    current() = c;
    return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(Context** c) {
    ENTER_ANY(cuCtxGetCurrent);
    *c = current();
    return CUDA_SUCCESS;
}
CUresult cuCtxPushCurrent_v2(Context* c) { return cuCtxSetCurrent(c); }
CUresult cuCtxPopCurrent_v2(Context** c) {
    ENTER(cuCtxPopCurrent_v2);
    if (c) *c = current();
    current() = nullptr;
    return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* d) {
    ENTER(cuCtxGetDevice);
    *d = 0;
    return CUDA_SUCCESS;
}
CUresult cuCtxGetFlags(unsigned* f) {
    ENTER(cuCtxGetFlags);
    *f = current()->flags;
    return CUDA_SUCCESS;
}
CUresult cuCtxGetApiVersion(Context*, unsigned* v) {
    ENTER(cuCtxGetApiVersion);
    *v = 12060;
    return CUDA_SUCCESS;
}
CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    ENTER(cuCtxGetStreamPriorityRange);
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return CUDA_SUCCESS;
}
CUresult cuCtxSynchronize(void) {
    ENTER(cuCtxSynchronize);
    drainAll(entry.lock);
    return state().sticky;
}
CUresult cuDevicePrimaryCtxRetain(Context** c, CUdevice d) {
    ENTER_DEVICE(cuDevicePrimaryCtxRetain);
    if (d) return CUDA_ERROR_INVALID_DEVICE;
    State& s = state();
    s.primary.primary = true;
    s.primaryUses++;
    *c = &s.primary;
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice d) {
    ENTER_DEVICE(cuDevicePrimaryCtxRelease_v2);
    if (d) return CUDA_ERROR_INVALID_DEVICE;
    if (!state().primaryUses) return CUDA_ERROR_INVALID_CONTEXT;
    if (!--state().primaryUses) drainAll(entry.lock);
    return state().sticky;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice d, unsigned* flags, int* active) {
    ENTER_DEVICE(cuDevicePrimaryCtxGetState);
    if (d) return CUDA_ERROR_INVALID_DEVICE;
    if (flags) *flags = state().primary.flags;
    if (active) *active = state().primaryUses > 0;
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxSetFlags_v2(CUdevice d, unsigned flags) {
    ENTER_DEVICE(cuDevicePrimaryCtxSetFlags_v2);
    if (d) return CUDA_ERROR_INVALID_DEVICE;
    state().primary.flags = flags;
    return CUDA_SUCCESS;
}

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
    for (auto& [name, f] : m->functions) s.functions.erase(f.get());
    for (uint64_t a : m->placed) s.memory->release(a);
    s.modules.erase(m);
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
static int threadsLimit(const ptx::Kernel& k) { return k.maxThreads ? int(k.maxThreads) : 1024; }
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
