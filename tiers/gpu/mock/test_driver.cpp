// The driver: laziness of streams, life of objects, and the faults that tests may ask for.
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <thread>

#include "test.h"

namespace {

// k doubles n words of in into out.
std::string doubler() {
    return kernel("setp.ge.u32 p1, r0, r1; @p1 ret; mul.wide.u32 d2, r0, 4; add.s64 d3, d0, d2; ld.global.u32 r2, [d3]; add.u32 r2, r2, r2; add.s64 d3, d1, d2; st.global.u32 [d3], r2;");
}
struct Doubler {
    void *module = nullptr, *f = nullptr;
    Doubler() {
        OK(cu.cuModuleLoadData(&module, doubler().c_str()));
        OK(cu.cuModuleGetFunction(&f, module, "k"));
    }
    ~Doubler() { cu.cuModuleUnload(module); }
    CUresult run(CUdeviceptr in, CUdeviceptr out, unsigned n, void* stream) {
        void* args[] = {&in, &out, &n};
        return cu.cuLaunchKernel(f, 1, 1, 1, 64, 1, 1, 0, stream, args, nullptr);
    }
};

TEST(streamsAndEvents) {
    Doubler k;
    Buffer a(256), b(256), c(256);
    void *s1, *s2, *e1, *e2;
    uint32_t* host;
    OK(cu.cuMemHostAlloc(reinterpret_cast<void**>(&host), 512, 0));
    for (uint32_t i = 0; i < 64; i++) host[i] = i;
    OK(cu.cuStreamCreate(&s1, 1));
    OK(cu.cuStreamCreate(&s2, 1));
    OK(cu.cuEventCreate(&e1, 0));
    OK(cu.cuEventCreate(&e2, 0));
    OK(cu.cuEventQuery(e1));  // never recorded: as if done
    OK(cu.cuMemcpyHtoDAsync_v2(a.at, host, 256, s1));
    OK(k.run(a.at, b.at, 64, s1));
    OK(cu.cuEventRecord(e1, s1));
    OK(cu.cuStreamWaitEvent(s2, e1, 0));
    OK(k.run(b.at, c.at, 64, s2));
    OK(cu.cuMemcpyDtoHAsync_v2(host + 64, c.at, 256, s2));
    OK(cu.cuEventRecord(e2, s2));
    OK(cu.cuEventSynchronize(e2));
    for (uint32_t i = 0; i < 64; i++) EQUAL(host[64 + i], 4 * i);
    OK(cu.cuEventQuery(e2));
    OK(cu.cuStreamQuery(s1));
    float ms = -1;
    OK(cu.cuEventElapsedTime(&ms, e1, e2));
    CHECK(ms >= 0);
    OK(cu.cuEventDestroy_v2(e1));
    OK(cu.cuEventDestroy_v2(e2));
    OK(cu.cuStreamDestroy_v2(s1));
    OK(cu.cuStreamDestroy_v2(s2));
    OK(cu.cuMemFreeHost(host));
}

MOCK(nothingRunsUnlessWaitedFor) {
    Doubler k;
    Buffer a(256), b(256);
    void *s, *other, *e;
    uint32_t in[64], out[64] = {};
    for (auto& x : in) x = 5;
    OK(cu.cuStreamCreate(&s, 1));
    OK(cu.cuStreamCreate(&other, 1));
    OK(cu.cuEventCreate(&e, 0));
    OK(cu.cuMemcpyHtoDAsync_v2(a.at, in, 256, s));
    OK(k.run(a.at, b.at, 64, s));
    OK(cu.cuMemcpyDtoHAsync_v2(out, b.at, 256, s));
    OK(cu.cuEventRecord(e, s));
    EQUAL(out[0], 0u);
    in[0] = 7;  // too early: the copy reads it when it runs
    OK(cu.cuStreamSynchronize(other));
    EQUAL(out[0], 0u);
    // Whoever asks often enough gets there, a piece at a time.
    int asked = 0;
    while (cu.cuEventQuery(e) == 600 && asked < 100) asked++;
    EQUAL(asked, 4);
    EQUAL(out[0], 14u);
    EQUAL(out[1], 10u);
    OK(cu.cuStreamDestroy_v2(s));
    OK(cu.cuStreamDestroy_v2(other));
    OK(cu.cuEventDestroy_v2(e));
}

MOCK(aForgottenWaitShows) {
    auto pipeline = [](bool wait) {
        Doubler k;
        Buffer a(256), b(256);
        void *s1, *s2, *e;
        uint32_t in[64], out[64] = {};
        for (auto& x : in) x = 1;
        cu.cuMemsetD8_v2(a.at, 0, 256);
        cu.cuStreamCreate(&s1, 1);
        cu.cuStreamCreate(&s2, 1);
        cu.cuEventCreate(&e, 0);
        cu.cuMemcpyHtoDAsync_v2(a.at, in, 256, s1);
        cu.cuEventRecord(e, s1);
        if (wait) cu.cuStreamWaitEvent(s2, e, 0);
        cu.cuCtxSetCurrent(nullptr);  // other threads may not have a context
        EQUAL(cu.cuStreamSynchronize(s2), 201);
        std::thread([&] {
            EQUAL(cu.cuStreamSynchronize(s2), 201);
        }).join();
        void* again;
        OK(cu.cuDevicePrimaryCtxRetain(&again, 0));
        OK(cu.cuCtxSetCurrent(again));
        OK(cu.cuMemsetD32Async(b.at, 0, 64, s2));
        k.run(a.at, b.at, 64, s2);
        cu.cuMemcpyDtoHAsync_v2(out, b.at, 256, s2);
        CUresult e2 = cu.cuStreamSynchronize(s2);
        uint32_t r = e2 ? 1000u + e2 : out[0];
        cu.cuCtxSynchronize();
        cu.cuStreamDestroy_v2(s1);
        cu.cuStreamDestroy_v2(s2);
        cu.cuEventDestroy_v2(e);
        cu.mock_reset();
        return r;
    };
    EQUAL(pipeline(true), 2u);
    CHECK(pipeline(false) != 2u);
    cu.mock_drop_wait(1);
    CHECK(pipeline(true) != 2u);
    EQUAL(pipeline(true), 2u);
}

TEST(theDefaultStreamWaitsForBlockingOnes) {
    Doubler k;
    Buffer a(256), b(256);
    void* s;
    uint32_t in[64], out[64] = {};
    for (auto& x : in) x = 3;
    OK(cu.cuStreamCreate(&s, 0));
    OK(cu.cuMemcpyHtoD_v2(a.at, in, 256));
    OK(k.run(a.at, b.at, 64, s));
    OK(cu.cuMemcpyDtoH_v2(out, b.at, 256));
    EQUAL(out[5], 6u);
    OK(k.run(b.at, a.at, 64, nullptr));
    OK(cu.cuMemcpyDtoHAsync_v2(out, a.at, 256, s));
    OK(cu.cuStreamSynchronize(s));
    EQUAL(out[5], 12u);
    OK(cu.cuStreamDestroy_v2(s));
}

TEST(hostFunctionsRunInOrder) {
    static std::atomic<int> seen{0};
    void* s;
    Buffer a(64);
    OK(cu.cuStreamCreate(&s, 1));
    OK(cu.cuMemsetD32Async(a.at, 9, 16, s));
    OK(cu.cuLaunchHostFunc(s, [](void* p) { seen = *static_cast<int*>(p); }, new int(41)));
    OK(cu.cuLaunchHostFunc(s, [](void*) { seen++; }, nullptr));
    OK(cu.cuStreamSynchronize(s));
    EQUAL(seen.load(), 42);
    OK(cu.cuStreamDestroy_v2(s));
}

TEST(pinnedMemoryIsReadByKernels) {
    Doubler k;
    size_t page = 4096;
    auto* p = static_cast<uint32_t*>(mmap(nullptr, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    for (uint32_t i = 0; i < 64; i++) p[i] = i;
    OK(cu.cuMemHostRegister_v2(p, page, 2));
    EQUAL(cu.cuMemHostRegister_v2(p, page, 2), 712);
    CUdeviceptr d;
    OK(cu.cuMemHostGetDevicePointer_v2(&d, p, 0));
    OK(k.run(d, d + 1024, 64, nullptr));
    OK(cu.cuCtxSynchronize());
    EQUAL(p[256 + 63], 126u);
    OK(cu.cuMemHostUnregister(p));
    EQUAL(cu.cuMemHostUnregister(p), 713);
    munmap(p, page);
}

MOCK(pinnedMemoryIsWatched) {
    size_t page = 4096;
    auto map = [&](size_t pages) { return static_cast<uint8_t*>(mmap(nullptr, pages * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)); };
    uint8_t *p = map(4), *other = map(1);
    Buffer a(8192);
    void* s;
    OK(cu.cuStreamCreate(&s, 1));
    OK(cu.cuMemHostRegister_v2(p + page, page, 2));
    for (auto [from, pages] : {std::pair<int, int>{0, 3}, {0, 2}, {1, 2}, {1, 1}}) EQUAL(cu.cuMemHostRegister_v2(p + from * page, pages * page, 2), 712);
    OK(cu.cuMemHostRegister_v2(p, page, 2));
    uint64_t before = cu.mock_pageable_bytes();
    OK(cu.cuMemcpyHtoDAsync_v2(a.at, p + page, page, s));
    EQUAL(cu.cuMemcpyHtoDAsync_v2(a.at, p + page + 1, page, s), 1);  // beyond its end
    EQUAL(cu.cuMemcpyDtoHAsync_v2(p + page + 1, a.at, page, s), 1);
    EQUAL(cu.mock_pageable_bytes(), before);
    OK(cu.cuMemcpyHtoDAsync_v2(a.at, p + 3 * page, page, s));
    EQUAL(cu.mock_pageable_bytes(), before + page);
    OK(cu.cuStreamSynchronize(s));
    EQUAL(cu.cuMemHostUnregister(p + 2 * page), 713);
    OK(cu.cuMemHostUnregister(p));
    munmap(other, page);
    EQUAL(cu.cuMemHostRegister_v2(other, page, 2), 1);  // not mapped
    OK(cu.cuMemcpyHtoDAsync_v2(a.at, p + page, page, s));
    cu.mock_set("strict_free", 1);
    OK(cu.cuMemHostUnregister(p + page));
    EQUAL(cu.cuStreamSynchronize(s), 719);  // the copy was still queued
    cu.mock_reset();
    cu.mock_set("strict_free", std::getenv("MOCKCUDA_STRICT_FREE") != nullptr);
    OK(cu.cuMemHostRegister_v2(p, page, 2));
    munmap(p, 4 * page);
    EQUAL(cu.cuMemHostUnregister(p), 719);
    cu.mock_reset();
    OK(cu.cuStreamDestroy_v2(s));
}

TEST(wrongCallsAreRefused) {
    Doubler k;
    Buffer a(256);
    uint32_t x[64] = {};
    if (cu.mock_reset) {  // a real driver faults instead
        EQUAL(cu.cuStreamSynchronize(reinterpret_cast<void*>(0x1234)), 400);
        EQUAL(cu.cuMemFree_v2(a.at + 1), 1);
        EQUAL(cu.cuMemcpyHtoD_v2(a.at + 200, x, 100), 1);
        EQUAL(cu.cuGraphCreate(nullptr, 0), 801);
    }
    void* f;
    EQUAL(cu.cuModuleGetFunction(&f, k.module, "nobody"), 500);
    EQUAL(cu.cuLaunchKernel(k.f, 1, 1, 1, 2048, 1, 1, 0, nullptr, nullptr, nullptr), 1);
    EQUAL(cu.cuLaunchKernel(k.f, 1, 70000, 1, 32, 1, 1, 0, nullptr, nullptr, nullptr), 1);
    void* args[3] = {x, x + 2, x + 4};
    EQUAL(cu.cuLaunchKernel(k.f, 1, 1, 1, 32, 1, 1, 60 << 10, nullptr, args, nullptr), 1);
    OK(cu.cuFuncSetAttribute(k.f, 8, 100 << 10));
    int v;
    OK(cu.cuFuncGetAttribute(&v, 8, k.f));
    EQUAL(v, 100 << 10);
    EQUAL(cu.cuFuncSetAttribute(k.f, 8, 300 << 10), 1);
    int blocks;
    OK(cu.cuOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, k.f, 128, 100 << 10));
    CHECK(blocks == 2 || !cu.mock_reset);
    void* m;
    if (cu.mock_reset) EQUAL(cu.cuModuleLoadData(&m, "\177ELF"), 200);
    char log[500] = "";
    int options[] = {5, 6};
    void* values[] = {log, reinterpret_cast<void*>(sizeof log)};
    EQUAL(cu.cuModuleLoadDataEx(&m, ".version 7.0\n.target sm_80\n.address_size 64\n.visible .entry k() { nonsense; }", 2, options, values), 218);
    CHECK(std::strstr(log, "nonsense"));
    const char* s;
    OK(cu.cuGetErrorName(719, &s));
    CHECK(!std::strcmp(s, "CUDA_ERROR_LAUNCH_FAILED"));
    OK(cu.cuGetErrorString(2, &s));
    CHECK(!std::strcmp(s, "out of memory"));
    EQUAL(cu.cuGetErrorString(31337, &s), 1);
}

MOCK(theDevice) {
    int v;
    for (auto [attribute, want] : {std::pair<int, int>{75, 9}, {76, 0}, {16, 4}, {97, 232448}, {10, 32}, {8, 49152}, {39, 2048}}) {
        OK(cu.cuDeviceGetAttribute(&v, attribute, 0));
        EQUAL(v, want);
    }
    size_t total, free, all;
    OK(cu.cuDeviceTotalMem_v2(&total, 0));
    OK(cu.cuMemGetInfo_v2(&free, &all));
    EQUAL(all, total);
    Buffer a(1000);
    size_t less;
    OK(cu.cuMemGetInfo_v2(&less, &all));
    EQUAL(free - less, 1024u);
}

MOCK(aContextTakesItsThingsWithIt) {
    size_t before, after, total;
    OK(cu.cuMemGetInfo_v2(&before, &total));
    void *context, *module, *stream, *event, *host;
    CUdeviceptr a;
    OK(cu.cuCtxCreate_v2(&context, 0, 0));
    OK(cu.cuMemAlloc_v2(&a, 1 << 20));
    OK(cu.cuMemHostAlloc(&host, 4096, 0));
    OK(cu.cuModuleLoadData(&module, doubler().c_str()));
    OK(cu.cuStreamCreate(&stream, 0));
    OK(cu.cuEventCreate(&event, 0));
    OK(cu.cuEventRecord(event, stream));
    OK(cu.cuCtxDestroy_v2(context));
    EQUAL(cu.cuMemFree_v2(a), 201);
    OK(cu.cuDevicePrimaryCtxRetain(&context, 0));
    OK(cu.cuCtxSetCurrent(context));
    EQUAL(cu.cuMemFree_v2(a), 1);
    EQUAL(cu.cuModuleUnload(module), 400);
    EQUAL(cu.cuEventSynchronize(event), 400);
    OK(cu.cuMemGetInfo_v2(&after, &total));
    EQUAL(after, before);
}

MOCK(outOfMemory) {
    size_t total;
    OK(cu.cuDeviceTotalMem_v2(&total, 0));
    cu.mock_set_memory(1 << 20);
    CUdeviceptr a, b;
    OK(cu.cuMemAlloc_v2(&a, 700 << 10));
    EQUAL(cu.cuMemAlloc_v2(&b, 400 << 10), 2);
    OK(cu.cuMemAlloc_v2(&b, 300 << 10));
    OK(cu.cuMemFree_v2(a));
    OK(cu.cuMemFree_v2(b));
    cu.mock_set_memory(total);
}

MOCK(faultsOnRequest) {
    CUdeviceptr a;
    cu.mock_fail("cuMemAlloc", 2, 2);
    OK(cu.cuMemAlloc_v2(&a, 64));
    OK(cu.cuMemFree_v2(a));
    EQUAL(cu.cuMemAlloc_v2(&a, 64), 2);
    OK(cu.cuMemAlloc_v2(&a, 64));
    OK(cu.cuMemFree_v2(a));
    cu.mock_fail("cuMemcpyHtoD_v2", 1, 719);
    EQUAL(cu.cuMemcpyHtoD_v2(a, &a, 8), 719);
}

MOCK(memoryFlips) {
    CUdeviceptr a, b;
    OK(cu.cuMemAlloc_v2(&a, 64));
    OK(cu.cuMemAlloc_v2(&b, 64));
    const char text[] = "..needle..needle";
    OK(cu.cuMemcpyHtoD_v2(a, text, 16));
    OK(cu.cuMemcpyHtoD_v2(b + 58, text + 2, 6));
    EQUAL(cu.mock_flip("needle", 6, 8 * 6), 0);
    EQUAL(cu.mock_flip("noodle", 6, 0), 0);
    EQUAL(cu.mock_flip("needle", 6, 17), 3);  // e to g
    char is[16];
    OK(cu.cuMemcpyDtoH_v2(is, a, 16));
    CHECK(!std::memcmp(is, "..negdle..negdle", 16));
    OK(cu.cuMemcpyDtoH_v2(is, b + 58, 6));
    CHECK(!std::memcmp(is, "negdle", 6));
    OK(cu.cuMemFree_v2(a));
    OK(cu.cuMemFree_v2(b));
}

MOCK(aLostDeviceStaysLost) {
    Doubler k;
    CUdeviceptr a;
    cu.mock_device_lost(999);
    EQUAL(cu.cuMemAlloc_v2(&a, 64), 999);
    EQUAL(cu.cuCtxSynchronize(), 999);
    EQUAL(k.run(0, 0, 0, nullptr), 999);
    EQUAL(cu.cuStreamSynchronize(nullptr), 999);
    cu.mock_reset();
    OK(cu.cuCtxSynchronize());
}

MOCK(aStuckDeviceKeepsWhoWaits) {
    void *c, *s, *idle, *e;
    OK(cu.cuDevicePrimaryCtxRetain(&c, 0));
    OK(cu.cuStreamCreate(&s, 1));
    OK(cu.cuStreamCreate(&idle, 1));
    OK(cu.cuEventCreate(&e, 0));
    cu.mock_set("stalled", 1);
    OK(cu.cuStreamSynchronize(idle));
    for (int how = 0; how < 3; how++) {
        Buffer a(256);
        CUdeviceptr spare;
        OK(cu.cuMemAlloc_v2(&spare, 64));
        uint32_t x[64], word = 0;
        for (auto& y : x) y = 7;
        OK(cu.cuMemcpyHtoDAsync_v2(a.at, x, sizeof x, s));
        OK(cu.cuMemcpyDtoHAsync_v2(&word, a.at, 4, s));
        OK(cu.cuEventRecord(e, s));
        EQUAL(cu.cuEventQuery(e), 600);
        EQUAL(cu.cuStreamQuery(s), 600);
        std::atomic<bool> returned{false};
        std::thread waits([&] {
            cu.cuCtxSetCurrent(c);
            if (how == 0) cu.cuStreamSynchronize(s);
            if (how == 1) cu.cuEventSynchronize(e);
            if (how == 2) cu.cuMemFree_v2(spare);
            returned = true;
        });
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        CHECK(!returned && !word);
        cu.mock_set("stalled", 0);
        waits.join();
        OK(cu.cuStreamSynchronize(s));
        EQUAL(word, 7u);
        if (how < 2) OK(cu.cuMemFree_v2(spare));
        cu.mock_set("stalled", how < 2);
    }
    OK(cu.cuEventDestroy_v2(e));
    OK(cu.cuStreamDestroy_v2(s));
    OK(cu.cuStreamDestroy_v2(idle));
}

MOCK(manyThreads) {
    Doubler k;
    void* c;
    OK(cu.cuDevicePrimaryCtxRetain(&c, 0));
    std::vector<std::thread> threads;
    std::atomic<int> wrong{0};
    for (uint32_t t = 0; t < 4; t++)
        threads.emplace_back([&, t] {
            cu.cuCtxSetCurrent(c);
            void* s;
            cu.cuStreamCreate(&s, 1);
            Buffer a(256), b(256);
            for (uint32_t round = 0; round < 50; round++) {
                uint32_t in[64], out[64] = {};
                for (uint32_t i = 0; i < 64; i++) in[i] = t * 1000 + round + i;
                cu.cuMemcpyHtoDAsync_v2(a.at, in, 256, s);
                k.run(a.at, b.at, 64, s);
                cu.cuLaunchHostFunc(s, [](void*) { std::this_thread::yield(); }, nullptr);
                cu.cuMemcpyDtoHAsync_v2(out, b.at, 256, s);
                wrong += cu.cuStreamSynchronize(s) != 0;
                for (uint32_t i = 0; i < 64; i++) wrong += out[i] != 2 * in[i];
            }
            cu.cuStreamDestroy_v2(s);
        });
    for (auto& t : threads) t.join();
    EQUAL(wrong.load(), 0);
}

std::string hex(const IpcHandle& h) {
    std::string s;
    for (char c : h.bytes) {
        char two[3];
        std::snprintf(two, sizeof two, "%02x", uint8_t(c));
        s += two;
    }
    return s;
}

TEST(memoryBetweenProcesses) {
    Buffer a(4096);
    uint32_t x[16];
    for (uint32_t i = 0; i < 16; i++) x[i] = i + 100;
    OK(cu.cuMemcpyHtoD_v2(a.at, x, sizeof x));
    IpcHandle h;
    OK(cu.cuIpcGetMemHandle(&h, a.at));
    char self[512] = "";
    CHECK(readlink("/proc/self/exe", self, sizeof self - 1) > 0);
    EQUAL(std::system((std::string(self) + " --ipc " + hex(h)).c_str()), 0);
    OK(cu.cuMemcpyDtoH_v2(x, a.at, sizeof x));
    EQUAL(x[0], 555u);
    EQUAL(x[1], 101u);
}

}  // namespace

// Adds to the memory of the first process: 0 if all was as it should be.
int otherProcess(const char* text) {
    IpcHandle h;
    for (int i = 0; i < 64; i++) h.bytes[i] = char(std::stoi(std::string(text + 2 * i, 2), nullptr, 16));
    CUdeviceptr a;
    uint32_t x = 555, y = 0;
    if (int e = cu.cuIpcOpenMemHandle_v2(&a, h, 1)) return e & 127 ? e & 127 : 1;
    if (cu.cuMemcpyDtoH_v2(&y, a + 4, 4) || y != 101) return 2;
    if (cu.cuMemcpyHtoD_v2(a, &x, 4) || cu.cuCtxSynchronize()) return 3;
    return cu.cuIpcCloseMemHandle(a);
}
