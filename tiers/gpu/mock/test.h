// The tests' side of the driver API. They open libcuda.so.1 as a program does, so those that check
// what instructions compute can also be run against a real driver and its GPU.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "abi.h"

struct IpcHandle { char bytes[64]; };

struct Api {
    CUresult (*cuInit)(unsigned);
    CUresult (*cuDeviceGet)(CUdevice*, int);
    CUresult (*cuDeviceGetAttribute)(int*, int, CUdevice);
    CUresult (*cuDeviceGetName)(char*, int, CUdevice);
    CUresult (*cuDeviceTotalMem_v2)(size_t*, CUdevice);
    CUresult (*cuCtxCreate_v2)(void**, unsigned, CUdevice);
    CUresult (*cuCtxDestroy_v2)(void*);
    CUresult (*cuCtxSetCurrent)(void*);
    CUresult (*cuCtxSynchronize)();
    CUresult (*cuDevicePrimaryCtxRetain)(void**, CUdevice);
    CUresult (*cuModuleLoadData)(void**, const void*);
    CUresult (*cuModuleLoadDataEx)(void**, const void*, unsigned, int*, void**);
    CUresult (*cuModuleUnload)(void*);
    CUresult (*cuModuleGetFunction)(void**, void*, const char*);
    CUresult (*cuModuleGetGlobal_v2)(CUdeviceptr*, size_t*, void*, const char*);
    CUresult (*cuFuncSetAttribute)(void*, int, int);
    CUresult (*cuFuncGetAttribute)(int*, int, void*);
    CUresult (*cuOccupancyMaxActiveBlocksPerMultiprocessor)(int*, void*, int, size_t);
    CUresult (*cuLaunchKernel)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
    CUresult (*cuLaunchHostFunc)(void*, void (*)(void*), void*);
    CUresult (*cuMemGetInfo_v2)(size_t*, size_t*);
    CUresult (*cuMemAlloc_v2)(CUdeviceptr*, size_t);
    CUresult (*cuMemFree_v2)(CUdeviceptr);
    CUresult (*cuMemHostAlloc)(void**, size_t, unsigned);
    CUresult (*cuMemFreeHost)(void*);
    CUresult (*cuMemHostRegister_v2)(void*, size_t, unsigned);
    CUresult (*cuMemHostUnregister)(void*);
    CUresult (*cuMemHostGetDevicePointer_v2)(CUdeviceptr*, void*, unsigned);
    CUresult (*cuMemcpyHtoD_v2)(CUdeviceptr, const void*, size_t);
    CUresult (*cuMemcpyDtoH_v2)(void*, CUdeviceptr, size_t);
    CUresult (*cuMemcpyHtoDAsync_v2)(CUdeviceptr, const void*, size_t, void*);
    CUresult (*cuMemcpyDtoHAsync_v2)(void*, CUdeviceptr, size_t, void*);
    CUresult (*cuMemcpyDtoDAsync_v2)(CUdeviceptr, CUdeviceptr, size_t, void*);
    CUresult (*cuMemsetD8_v2)(CUdeviceptr, unsigned char, size_t);
    CUresult (*cuMemsetD32Async)(CUdeviceptr, unsigned, size_t, void*);
    CUresult (*cuStreamCreate)(void**, unsigned);
    CUresult (*cuStreamDestroy_v2)(void*);
    CUresult (*cuStreamSynchronize)(void*);
    CUresult (*cuStreamQuery)(void*);
    CUresult (*cuStreamWaitEvent)(void*, void*, unsigned);
    CUresult (*cuEventCreate)(void**, unsigned);
    CUresult (*cuEventDestroy_v2)(void*);
    CUresult (*cuEventRecord)(void*, void*);
    CUresult (*cuEventSynchronize)(void*);
    CUresult (*cuEventQuery)(void*);
    CUresult (*cuEventElapsedTime)(float*, void*, void*);
    CUresult (*cuGetErrorString)(CUresult, const char**);
    CUresult (*cuGetErrorName)(CUresult, const char**);
    CUresult (*cuIpcGetMemHandle)(IpcHandle*, CUdeviceptr);
    CUresult (*cuIpcOpenMemHandle_v2)(CUdeviceptr*, IpcHandle, unsigned);
    CUresult (*cuIpcCloseMemHandle)(CUdeviceptr);
    CUresult (*cuGraphCreate)(void**, unsigned);
    // Of the mock only; nullptr with a real driver.
    void (*mock_fail)(const char*, int, int);
    void (*mock_device_lost)(int);
    void (*mock_reset)();
    void (*mock_set_memory)(size_t);
    int (*mock_flip)(const void*, size_t, size_t);
    void (*mock_seed)(uint64_t);
    void (*mock_drop_wait)(int);
    void (*mock_drop_sync)(const char*, int);
    void (*mock_set_max_instructions)(uint64_t);
    int (*mock_set)(const char*, int);
    size_t (*mock_last_error)(char*, size_t);
    uint64_t (*mock_calls)(const char*);
    uint64_t (*mock_pageable_bytes)();
    uint64_t (*mock_counter)(const char*, const char*);
    void (*mock_clear_counters)();
    size_t (*mock_report)(char*, size_t);
};
extern Api cu;

// ---- tests ----
struct Test {
    const char* name;
    bool onlyMock;
    std::function<void()> body;
};
std::vector<Test>& tests();
struct AddTest {
    AddTest(const char* name, bool onlyMock, std::function<void()> f) { tests().push_back({name, onlyMock, std::move(f)}); }
};
// TEST: what a GPU does too. MOCK: what only the mock finds.
#define TEST(name) static void name(); static AddTest add_##name(#name, false, name); static void name()
#define MOCK(name) static void name(); static AddTest add_##name(#name, true, name); static void name()

void failTest(const char* file, int line, const std::string& what);
#define CHECK(cond) do { if (!(cond)) failTest(__FILE__, __LINE__, #cond); } while (0)
#define EQUAL(a, b) do { auto a_ = (a); decltype(a_) b_ = (b); if (a_ != b_) failTest(__FILE__, __LINE__, #a " is " + std::to_string(a_) + ", not " + std::to_string(b_)); } while (0)
#define OK(call) EQUAL(call, 0)

int otherProcess(const char* handle);  // what test_driver.cpp starts for memory between processes

// ---- kernels ----
// A kernel k(in, out, n): d0 and d1 hold the pointers as global addresses, r0 the thread, r1 n.
// Registers r<64>, d<32>, h<32>, f<64>, p<16>, g<8> (f64) are declared.
std::string kernel(const std::string& body, const std::string& globals = "", const std::string& tuning = "");

struct Buffer {
    CUdeviceptr at = 0;
    explicit Buffer(size_t bytes) { cu.cuMemAlloc_v2(&at, bytes); }
    ~Buffer() { cu.cuMemFree_v2(at); }
    Buffer(const Buffer&) = delete;
};

struct Shape { unsigned blocks = 1, threads = 32, dynamic = 0; };

// Loads the source, runs k on copies of in and out, and copies out back. Returns the result.
CUresult launch(const std::string& source, const void* in, size_t inBytes, void* out, size_t outBytes, Shape shape = {}, unsigned n = 0,
                bool clearOut = true);
std::string lastError();
// The launch must fail with the code, and the text name each of the words.
void expectFault(const std::string& source, CUresult code, std::vector<const char*> words, Shape shape = {});
