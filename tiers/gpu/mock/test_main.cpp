#include "test.h"

#include <dlfcn.h>

#include <chrono>
#include <cstdlib>
#include <fstream>
#include <stdexcept>

Api cu;

std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}

static int failures;
void failTest(const char* file, int line, const std::string& what) {
    std::printf("  %s:%d: %s\n", file, line, what.c_str());
    failures++;
}

std::string kernel(const std::string& body, const std::string& globals, const std::string& tuning) {
    return ".version 7.8\n.target sm_80\n.address_size 64\n" + globals +
        "\n.visible .entry k(.param .u64 in, .param .u64 out, .param .u32 n)\n" + tuning + "\n{\n"
        ".reg .b32 r<64>; .reg .b64 d<32>; .reg .b16 h<32>; .reg .f32 f<64>; .reg .pred p<16>; .reg .f64 g<8>;\n"
        "ld.param.u64 d0, [in]; ld.param.u64 d1, [out]; ld.param.u32 r1, [n];\n"
        "cvta.to.global.u64 d0, d0; cvta.to.global.u64 d1, d1; mov.u32 r0, %tid.x;\n" + body + "\nret;\n}\n";
}

CUresult launch(const std::string& source, const void* in, size_t inBytes, void* out, size_t outBytes, Shape shape, unsigned n, bool clearOut) {
    if (const char* dir = std::getenv("DUMP_PTX")) {  // to have another assembler judge it
        static int n = 0;
        std::ofstream(std::string(dir) + "/" + std::to_string(n++) + ".ptx") << source;
    }
    void *module, *function;
    if (CUresult e = cu.cuModuleLoadData(&module, source.c_str())) return e;
    if (CUresult e = cu.cuModuleGetFunction(&function, module, "k")) return e;
    if (shape.dynamic > 48 << 10) cu.cuFuncSetAttribute(function, 8, int(shape.dynamic));
    Buffer a(inBytes ? inBytes : 16), b(outBytes ? outBytes : 16);
    if (inBytes) cu.cuMemcpyHtoD_v2(a.at, in, inBytes);
    if (clearOut) cu.cuMemsetD8_v2(b.at, 0, outBytes ? outBytes : 16);
    void* args[] = {&a.at, &b.at, &n};
    CUresult e = cu.cuLaunchKernel(function, shape.blocks, 1, 1, shape.threads, 1, 1, shape.dynamic, nullptr, args, nullptr);
    if (!e) e = cu.cuCtxSynchronize();
    if (!e && outBytes) e = cu.cuMemcpyDtoH_v2(out, b.at, outBytes);
    cu.cuModuleUnload(module);
    return e;
}

std::string lastError() {
    std::string s(8192, 0);
    s.resize(std::min(s.size() - 1, cu.mock_last_error(s.data(), s.size())));
    return s;
}

void expectFault(const std::string& source, CUresult code, std::vector<const char*> words, Shape shape) {
    uint32_t in[4096], out[4096];
    for (uint32_t i = 0; i < 4096; i++) in[i] = i;
    CUresult got = launch(source, in, sizeof in, out, sizeof out, shape);
    std::string text = lastError();
    if (got != code) failTest("", 0, "result " + std::to_string(got) + ", expected " + std::to_string(code) + ": " + text);
    for (auto w : words)
        if (text.find(w) == text.npos) failTest("", 0, std::string("'") + w + "' is not in: " + text);
    if (code && cu.cuCtxSynchronize() != code && code >= 700) failTest("", 0, "the error does not stick");
    cu.mock_reset();
}

template <class F>
static void resolve(void* lib, F& f, const char* name) { f = reinterpret_cast<F>(dlsym(lib, name)); }

int main(int argc, char** argv) {
    void* lib = dlopen("libcuda.so.1", RTLD_NOW);
    if (!lib) return std::printf("%s\n", dlerror()), 2;
#define R(name) resolve(lib, cu.name, #name)
    R(cuInit); R(cuDeviceGet); R(cuDeviceGetAttribute); R(cuDeviceGetName); R(cuDeviceTotalMem_v2); R(cuCtxCreate_v2);
    R(cuCtxDestroy_v2); R(cuCtxSetCurrent); R(cuCtxSynchronize); R(cuDevicePrimaryCtxRetain); R(cuModuleLoadData);
    R(cuModuleLoadDataEx); R(cuModuleUnload); R(cuModuleGetFunction); R(cuModuleGetGlobal_v2); R(cuFuncSetAttribute);
    R(cuFuncGetAttribute); R(cuOccupancyMaxActiveBlocksPerMultiprocessor); R(cuLaunchKernel); R(cuLaunchHostFunc);
    R(cuMemGetInfo_v2); R(cuMemAlloc_v2); R(cuMemFree_v2); R(cuMemHostAlloc); R(cuMemFreeHost); R(cuMemHostRegister_v2);
    R(cuMemHostUnregister); R(cuMemHostGetDevicePointer_v2); R(cuMemcpyHtoD_v2); R(cuMemcpyDtoH_v2); R(cuMemcpyHtoDAsync_v2);
    R(cuMemcpyDtoHAsync_v2); R(cuMemcpyDtoDAsync_v2); R(cuMemsetD8_v2); R(cuMemsetD32Async); R(cuStreamCreate);
    R(cuStreamDestroy_v2); R(cuStreamSynchronize); R(cuStreamQuery); R(cuStreamWaitEvent); R(cuEventCreate);
    R(cuEventDestroy_v2); R(cuEventRecord); R(cuEventSynchronize); R(cuEventQuery); R(cuEventElapsedTime);
    R(cuGetErrorString); R(cuGetErrorName); R(cuGraphCreate); R(cuIpcGetMemHandle); R(cuIpcOpenMemHandle_v2);
    R(cuIpcCloseMemHandle);
    R(mock_fail); R(mock_device_lost); R(mock_reset); R(mock_set_memory); R(mock_flip); R(mock_seed); R(mock_drop_wait); R(mock_drop_sync); R(mock_set); R(mock_set_max_instructions);
    R(mock_last_error); R(mock_calls); R(mock_pageable_bytes); R(mock_counter); R(mock_clear_counters); R(mock_report);
#undef R
    bool isMock = cu.mock_reset != nullptr;
    void* context;
    CUdevice device;
    if (int e = cu.cuInit(0)) return std::printf("cuInit: %d\n", e), 2;
    cu.cuDeviceGet(&device, 0);
    if (int e = cu.cuCtxCreate_v2(&context, 0, device)) return std::printf("cuCtxCreate: %d\n", e), 2;
    char name[128] = "";
    cu.cuDeviceGetName(name, sizeof name, device);
    if (argc > 1 && !std::strcmp(argv[1], "--ipc")) return otherProcess(argv[2]);
    int bad = 0, ran = 0;
    for (auto& t : tests()) {
        if ((t.onlyMock && !isMock) || (argc > 1 && !std::strstr(t.name, argv[1]))) continue;
        failures = 0;
        auto from = std::chrono::steady_clock::now();
        cu.cuCtxSetCurrent(context);
        t.body();
        if (isMock) cu.mock_reset();
        double ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - from).count();
        if (failures || ms > 1000) std::printf("%s %s (%.0f ms)\n", failures ? "FAIL" : "slow", t.name, ms);
        bad += failures != 0;
        ran++;
    }
    std::printf("%d tests on %s, %d failed\n", ran, name, bad);
    return bad != 0;
}
