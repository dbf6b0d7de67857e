// Entry points of the driver API about the device, its contexts, and what errors are called.
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
}  // extern "C"

// A context takes with it all that was made while it was current.
static void end(Context* c) {
    State& s = state();
    std::vector<Module*> modules;
    for (auto& [m, keep] : s.modules)
        if (m->owner == c) modules.push_back(m);
    for (auto* m : modules) unload(m);
    std::vector<uint64_t> memory;
    for (auto& [base, owner] : s.owners)
        if (owner == c) memory.push_back(base);
    for (uint64_t base : memory)
        if (!freeDevice(base)) freeHost(reinterpret_cast<void*>(base));
    for (auto i = s.streams.begin(); i != s.streams.end();) i = i->first->owner == c ? s.streams.erase(i) : std::next(i);
    for (auto i = s.events.begin(); i != s.events.end();) i = i->first->owner == c ? s.events.erase(i) : std::next(i);
}

extern "C" {
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
    end(c);
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
    if (--state().primaryUses) return CUDA_SUCCESS;
    drainAll(entry.lock);
    end(&state().primary);
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

}  // extern "C"
