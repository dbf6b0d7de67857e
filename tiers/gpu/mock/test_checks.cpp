// Each check of the interpreter is made to speak once, and the same code without the mistake must pass.
#include "test.h"

namespace {

const char* const buf = ".shared .align 16 .b8 buf[1024];\n";
#define MY_WORD "mul.wide.u32 d2, r0, 4; add.s64 d3, d0, d2; add.s64 d4, d1, d2; shl.b32 r9, r0, 2; mov.u32 r10, buf; add.u32 r9, r9, r10;\n"

void passes(const std::string& source, Shape shape = {}) { expectFault(source, 0, {}, shape); }

// ---- loading ----

void refused(const std::string& source, std::vector<const char*> words) { expectFault(source, 218, words); }

MOCK(unknownInstructionsAreListed) {
    refused(kernel("wgmma.fence.sync.aligned;\nadd.u32 r2, r3, r4;\ntex.2d.v4.s32 {r2, r3, r4, r5}, [t, {r6, r7}];\nadd.pink.u32 r2, r3, r4;"),
        {"kernel k", "wgmma", "coordinates", "unknown modifier .pink"});
}
MOCK(localMemoryAndCallsAreRefused) {
    refused(kernel(".local .align 4 .b8 depot[16]; ld.local.u32 r2, [depot]; call f;"), {".local", "local memory is refused", "call"});
    refused(kernel("ret;", ".func f() { ret; }"), {".func"});
}
MOCK(strictOperands) {
    refused(kernel("add.u32 r2, r3, d4;"), {"register d4 has 8 bytes, not 4"});
    refused(kernel("add.u32 r2, r3, nothing;"), {"nothing"});
    refused(kernel("add.u32 r2, r3;"), {"number of operands"});
    refused(kernel("mov.u32 %tid.x, r0;"), {"%tid.x cannot be written"});
    refused(kernel("bra NOWHERE;"), {"no label NOWHERE"});
    refused(kernel("cp.async.cg.shared.global [r2], [d0], 8;"), {"cp.async's size"});
    refused(kernel("ld.param.u64 d2, [n];"), {"beyond the parameter"});
    refused(".version 7.0\n.target sm_80\n.visible .entry k() { .reg .b32 r<2>; .reg .b64 d<2>; ld.global.L2::128B.u32 r0, [d0]; ret; }", {"needs .version 7.4"});
    refused("not ptx", {"not"});
}

// ---- addresses ----

MOCK(globalBounds) {
    expectFault(kernel("ld.global.u32 r2, [d0+16384];"), 700, {"kernel k", "ld.global.u32 r2", "block (0,0,0) thread (0,0,0)", "bytes 16384 to 16388 of an allocation of 16384"});
    expectFault(kernel("mul.wide.u32 d2, r0, 1024; add.s64 d2, d1, d2; st.global.u32 [d2], r0;"), 700, {"thread (16,0,0)"});
    expectFault(kernel("mov.u64 d2, 8; ld.global.u32 r2, [d2];"), 700, {"null pointer"});
    expectFault(kernel("ld.global.u32 r2, [d0+-4];"), 700, {"before the allocation"});
}
MOCK(freedMemory) {
    void *module, *f;
    OK(cu.cuModuleLoadData(&module, kernel("ld.global.u32 r2, [d0];").c_str()));
    OK(cu.cuModuleGetFunction(&f, module, "k"));
    CUdeviceptr a, b;
    unsigned n = 0;
    OK(cu.cuMemAlloc_v2(&a, 64));
    OK(cu.cuMemFree_v2(a));
    OK(cu.cuMemAlloc_v2(&b, 64));
    CHECK(a != b);
    void* args[] = {&a, &b, &n};
    OK(cu.cuLaunchKernel(f, 1, 1, 1, 1, 1, 1, 0, nullptr, args, nullptr));
    EQUAL(cu.cuCtxSynchronize(), 700);
    CHECK(lastError().find("freed memory") != std::string::npos);
    EQUAL(cu.cuMemFree_v2(b), 700);  // but it is free
}
MOCK(alignment) {
    expectFault(kernel("ld.global.v4.u32 {r2, r3, r4, r5}, [d0+8];"), 716, {"not aligned to the 16 bytes"});
    expectFault(kernel("ld.global.u16 h2, [d0+1];"), 716, {});
    expectFault(kernel("mov.u32 r2, buf; st.shared.v2.u32 [r2+4], {r0, r0};", buf), 716, {"offset 4"});
    expectFault(kernel("mov.u32 r2, buf; cp.async.cg.shared.global [r2], [d0+4], 16;", buf), 716, {});
    expectFault(kernel("mov.u32 r2, buf; cp.async.ca.shared.global [r2+4], [d0], 8;", buf), 716, {});
    expectFault(kernel("shl.b32 r2, r0, 3; mov.u32 r4, buf; add.u32 r2, r2, r4; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {r3}, [r2];", buf), 716, {"not aligned to 16"});
}
MOCK(sharedBounds) {
    expectFault(kernel("mov.u32 r2, buf; st.shared.u32 [r2+1024], r0;", buf), 700, {"offset 1024", "the block has 1024"});
    expectFault(kernel("mov.u32 r2, buf; st.shared.u32 [r2+-4], r0;", buf), 700, {"shared"});
    expectFault(kernel("mov.u32 r2, dyn; st.shared.u32 [r2+64], r0;", ".extern .shared .align 16 .b8 dyn[];"), 700, {"the block has 64"}, {1, 32, 64});
    expectFault(kernel("mov.u32 r2, buf; cp.async.ca.shared.global [r2+1024], [d0], 8;", buf), 700, {"offset 1024"});
}

// ---- undefined values ----

MOCK(undefinedRegisters) {
    expectFault(kernel("cvt.u64.u32 d3, r40; add.s64 d2, d0, d3; ld.global.u32 r3, [d2];"), 719, {"the address", "never written"});
    expectFault(kernel("setp.eq.u32 p1, r40, 0; @p1 bra L; mov.u32 r2, 1; L: ret;"), 719, {"the guard"});
    expectFault(kernel("@p5 mov.u32 r2, 1;"), 719, {"the guard"});
    // Written by some lanes only.
    expectFault(kernel("setp.lt.u32 p1, r0, 31; @p1 mov.u32 r2, 0; setp.eq.u32 p2, r2, 0; @p2 bra L; L: ret;"), 719, {"thread (31,0,0)"});
    // Moved, masked away, or not selected: no harm.
    passes(kernel("mov.u32 r2, r40; and.b32 r3, r2, 0; setp.eq.u32 p1, r3, 0; @p1 bra L; L: selp.b32 r4, r40, r0, p2; "
        "setp.ne.u32 p2, r0, r0; selp.b32 r4, r40, r0, p2; setp.eq.u32 p1, r4, 3; @p1 bra M; M: ret;"));
}
MOCK(undefinedBytesOfWords) {
    // One byte of four is written; prmt, bfe, lop3 and shifts that take just that one are fine.
    std::string write = MY_WORD "st.shared.u8 [r9], r0; ld.shared.u32 r2, [r9];\n";
    auto use = [](const char* what) { return std::string(what) + " setp.eq.u32 p1, r3, 1; @p1 bra L; L: ret;"; };
    for (auto fine : {"prmt.b32 r3, r2, 0, 0x4440;", "bfe.u32 r3, r2, 0, 8;", "and.b32 r3, r2, 255;", "shl.b32 r3, r2, 24;",
             "lop3.b32 r3, r2, 255, 0x64006400, 0xea;", "cvt.u32.u8 r3, r2;", "mov.b32 {h2, h3}, r2; and.b16 h2, h2, 15; mov.b32 r3, {h2, h2};"})
        passes(kernel(write + use(fine), buf));
    for (auto wrong : {"prmt.b32 r3, r2, 0, 0x4441;", "bfe.u32 r3, r2, 4, 8;", "and.b32 r3, r2, 511;", "shr.u32 r3, r2, 8;",
             "lop3.b32 r3, r2, 0xff00, 0x64006400, 0xea;", "cvt.u32.u16 r3, r2;", "add.u32 r3, r2, 1;", "shl.b32 r3, r2, 23;"})
        expectFault(kernel(write + use(wrong), buf), 719, {"never written"});
}
MOCK(undefinedMemoryToTheHost) {
    uint32_t out[4];
    EQUAL(launch(kernel("st.global.u32 [d1], r0;"), nullptr, 0, out, 4, {1, 1}, 0, false), 0);
    EQUAL(launch(kernel("st.global.u32 [d1], r0;"), nullptr, 0, out, 8, {1, 1}, 0, false), 719);
    CHECK(lastError().find("byte 4") != std::string::npos);
    cu.mock_reset();
    // From undefined shared memory through arithmetic to global memory.
    EQUAL(launch(kernel("ld.shared.f32 f1, [buf]; add.f32 f1, f1, f1; st.global.f32 [d1], f1;", buf), nullptr, 0, out, 4, {1, 1}, 0, false), 719);
    cu.mock_reset();
    OK(cu.mock_set("undefined", 0) != 1);
    EQUAL(launch(kernel("st.global.u32 [d1], r0;"), nullptr, 0, out, 8, {1, 1}, 0, false), 0);
    cu.mock_set("undefined", 1);
}
MOCK(undefinedInMatrices) {
    // An undefined element of B meets zeros of A: for integers nothing happens, for floats a NaN may.
    auto mma = [](const char* types, int k, bool zero, const char* use) {
        return kernel("mov.u32 r10, " + std::string(zero ? "0" : "0x01010101") + "; mov.u32 r20, 0; mov.f32 f20, 0f00000000;"
            "mma.sync.aligned.m16n8k" + std::to_string(k) + ".row.col" + types + use);
    };
    const char* ints = " {r2, r3, r4, r5}, {r10, r10, r10, r10}, {r10, r40}, {r20, r20, r20, r20}; setp.eq.u32 p1, r2, 0; @p1 bra L; L: ret;";
    const char* halves = " {f2, f3, f4, f5}, {r10, r10, r10, r10}, {r10, r40}, {f20, f20, f20, f20}; setp.eq.f32 p1, f2, f20; @p1 bra L; L: ret;";
    passes(mma(".s32.u8.s8.s32", 32, true, ints));
    expectFault(mma(".s32.u8.s8.s32", 32, false, ints), 719, {"never written"});
    expectFault(mma(".f32.f16.f16.f32", 16, true, halves), 719, {"never written"});
}

// ---- races in shared memory ----

MOCK(sharedRaces) {
    // To the neighbour, across warps.
    std::string write = MY_WORD "st.shared.u32 [r9], r0;", read = "xor.b32 r4, r0, 32; shl.b32 r4, r4, 2; add.u32 r4, r4, r10; ld.shared.u32 r5, [r4];";
    expectFault(kernel(write + read, buf), 719, {"race: write of shared memory at offset 128", "read with no barrier between"}, {1, 64});
    passes(kernel(write + "bar.sync 0;" + read, buf), {1, 64});
    expectFault(kernel(write + "bar.warp.sync 0xffffffff;" + read, buf), 719, {"race"}, {1, 64});
    // Write after read: the barrier behind the read is missing.
    expectFault(kernel(write + "bar.sync 0;" + read + "st.shared.u32 [r9], r5;", buf), 719, {"race: read", "wrote with no barrier"}, {1, 64});
    passes(kernel(write + "bar.sync 0;" + read + "bar.sync 0; st.shared.u32 [r9], r5;", buf), {1, 64});
    // Two writers of a word; two writers of different bytes of a word are fine.
    expectFault(kernel("st.shared.u32 [buf], r0;", buf), 719, {"race: write", "wrote with no barrier"}, {1, 2});
    passes(kernel("mov.u32 r2, buf; add.u32 r2, r2, r0; st.shared.u8 [r2], r0; ld.shared.u8 r3, [r2];", buf), {1, 64});
}
MOCK(racesWithinAWarp) {
    std::string write = MY_WORD "st.shared.u32 [r9], r0;", read = "xor.b32 r4, r0, 1; shl.b32 r4, r4, 2; add.u32 r4, r4, r10; ld.shared.u32 r5, [r4];";
    expectFault(kernel(write + read, buf), 719, {"race"});
    passes(kernel(write + "bar.warp.sync 0xffffffff;" + read, buf));
    // A shuffle brings values, it does not order memory.
    std::string shuffled = kernel(write + "shfl.sync.bfly.b32 r6, r0, 1, 31, 0xffffffff;" + read, buf);
    expectFault(shuffled, 719, {"race"});
    cu.mock_set("shuffle_orders", 1);
    passes(shuffled);
    cu.mock_set("shuffle_orders", 0);
    // Barriers of half a warp order that half: with the partner in it, and with a partner outside.
    std::string half = "setp.lt.u32 p1, r0, 16; @p1 bra LOW; bar.warp.sync 0xffff0000; bra ON; LOW: bar.warp.sync 0x0000ffff; ON: ";
    passes(kernel(write + half + read, buf));
    expectFault(kernel(write + half + "xor.b32 r4, r0, 16; shl.b32 r4, r4, 2; add.u32 r4, r4, r10; ld.shared.u32 r5, [r4];", buf), 719, {"race"});
    cu.mock_set("races", 0);
    passes(kernel(write + read, buf));
    cu.mock_set("races", 1);
}
MOCK(namedBarriersOrderTheirWarpsOnly) {
    // Warps 0 and 1 meet at barrier 1; warp 2 does not.
    std::string write = MY_WORD "st.shared.u32 [r9], r0; setp.ge.u32 p1, r0, 64; @p1 bra THIRD; bar.sync 1, 64;\n";
    passes(kernel(write + "xor.b32 r4, r0, 32; shl.b32 r4, r4, 2; ld.shared.u32 r5, [r4]; THIRD: ret;", buf), {1, 96});
    expectFault(kernel(write + "ld.shared.u32 r5, [buf+256]; THIRD: ret;", buf), 719, {"race"}, {1, 96});
    // A producer arrives, a consumer waits: what the consumer did before is not known to the producer.
    std::string pc = MY_WORD "setp.ge.u32 p1, r0, 32; @p1 bra CONSUMER; st.shared.u32 [r9], r0; bar.arrive 2, 64; ret; CONSUMER: bar.sync 2, 64; ld.shared.u32 r5, [buf]; ret;";
    passes(kernel(pc, buf), {1, 64});
    std::string wrong = MY_WORD "setp.ge.u32 p1, r0, 32; @p1 bra CONSUMER; bar.arrive 2, 64; ld.shared.u32 r5, [buf+128]; ret; CONSUMER: st.shared.u32 [r9], r0; bar.sync 2, 64; ret;";
    expectFault(kernel(wrong, buf), 719, {"race"}, {1, 64});
}
MOCK(sharedAtomicsDoNotRaceWithEachOther) {
    std::string zero = "setp.ne.u32 p1, r0, 0; @p1 bra GO; mov.u32 r2, 0; st.shared.u32 [buf], r2; GO: bar.sync 0; red.shared.add.u32 [buf], 1;";
    passes(kernel(zero + "bar.sync 0; ld.shared.u32 r3, [buf];", buf), {1, 64});
    expectFault(kernel(zero + "ld.shared.u32 r3, [buf];", buf), 719, {"race"}, {1, 64});
    expectFault(kernel("red.shared.add.u32 [buf], 1;", buf), 719, {"undefined"}, {1, 1});
}
MOCK(ldmatrixReadsForWhoReceives) {
    std::string write = "shl.b32 r9, r0, 4; mov.u32 r10, buf; add.u32 r9, r9, r10; st.shared.v4.u32 [r9], {r0, r0, r0, r0};", load = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {r2, r3, r4, r5}, [r9];";
    expectFault(kernel(write + load, buf), 719, {"race"});
    passes(kernel(write + "bar.warp.sync 0xffffffff;" + load, buf));
}

// ---- asynchronous copies ----

#define COPY MY_WORD "cp.async.ca.shared.global [r9], [d3], 4;"
MOCK(bytesInFlight) {
    expectFault(kernel(COPY "ld.shared.u32 r2, [r9];", buf), 719, {"still being written by a cp.async"});
    expectFault(kernel(COPY "cp.async.commit_group; ld.shared.u32 r2, [r9];", buf), 719, {"cp.async"});
    expectFault(kernel(COPY "cp.async.wait_group 0; ld.shared.u32 r2, [r9];", buf), 719, {"cp.async"});  // never committed
    expectFault(kernel(COPY "cp.async.commit_group; cp.async.wait_group 1; ld.shared.u32 r2, [r9];", buf), 719, {"cp.async"});
    passes(kernel(COPY "cp.async.commit_group; cp.async.wait_group 0; ld.shared.u32 r2, [r9];", buf));
    passes(kernel(COPY "cp.async.wait_all; ld.shared.u32 r2, [r9];", buf));
    expectFault(kernel(COPY "st.shared.u32 [r9], r0;", buf), 719, {"cp.async"});
    expectFault(kernel("mov.u32 r9, buf; cp.async.ca.shared.global [r9], [d0], 4; cp.async.ca.shared.global [r9], [d0], 4;", buf), 719, {"cp.async"}, {1, 1});
    // Over what another thread reads: the barrier behind that read is missing.
    std::string reuse = MY_WORD "st.shared.u32 [r9], r0; bar.sync 0; xor.b32 r4, r9, 4; ld.shared.u32 r5, [r4];";
    expectFault(kernel(reuse + "cp.async.ca.shared.global [r9], [d3], 4;", buf), 719, {"race: cp.async"});
    passes(kernel(reuse + "bar.sync 0; cp.async.ca.shared.global [r9], [d3], 4;", buf));
}
MOCK(arrivedBytesNeedABarrierForOthers) {
    std::string other = "xor.b32 r4, r9, 4; ld.shared.u32 r2, [r4];", wait = "cp.async.commit_group; cp.async.wait_group 0;";
    expectFault(kernel(COPY + wait + other, buf), 719, {"race: read"});
    passes(kernel(COPY + wait + "bar.warp.sync 0xffffffff;" + other, buf));
    // The barrier before the wait does not help.
    expectFault(kernel(COPY "cp.async.commit_group; bar.warp.sync 0xffffffff; cp.async.wait_group 0;" + other, buf), 719, {"race"});
    // Across warps a warp's barrier does not do.
    std::string far = "xor.b32 r4, r9, 128; ld.shared.u32 r2, [r4];";
    expectFault(kernel(COPY + wait + "bar.warp.sync 0xffffffff;" + far, buf), 719, {"race"}, {1, 64});
    passes(kernel(COPY + wait + "bar.sync 0;" + far, buf), {1, 64});
}
MOCK(cpAsyncBoundsOfTheSource) {
    expectFault(kernel("mov.u32 r2, buf; cp.async.cg.shared.global [r2], [d0+16384], 16;", buf), 700, {"16384"}, {1, 1});
    passes(kernel("mov.u32 r2, buf; mov.u32 r3, 0; cp.async.cg.shared.global [r2], [d0+16384], 16, r3;", buf), {1, 1});
    expectFault(kernel("mov.u32 r2, buf; mov.u32 r3, 17; cp.async.cg.shared.global [r2], [d0], 16, r3;", buf), 719, {"source of 17"}, {1, 1});
}

// ---- races between blocks ----

MOCK(blocksRaceInGlobalMemory) {
    std::string block = "mov.u32 r2, %ctaid.x; mul.wide.u32 d2, r2, 4; add.s64 d2, d1, d2;";
    expectFault(kernel("st.global.u32 [d1], r0;"), 719, {"race between blocks: write", "block (0,0,0) wrote"}, {2, 1});
    expectFault(kernel(block + "st.global.u32 [d2], r0; ld.global.u32 r3, [d1];"), 719, {"race between blocks: read"}, {2, 1});
    expectFault(kernel(block + "ld.global.u32 r3, [d1+4]; st.global.u32 [d2], r0;"), 719, {"race between blocks: write", "read in the same launch"}, {2, 1});
    passes(kernel(block + "st.global.u32 [d2], r0; ld.global.u32 r3, [d2];"), {8, 1});
    passes(kernel("red.global.add.u32 [d1], 1;"), {8, 32});
    expectFault(kernel("red.global.add.u32 [d1], 1; ld.global.u32 r3, [d1];"), 719, {"race between blocks"}, {2, 1});
}
MOCK(theLastBlockMayRead) {
    // Partials, a counter, and the last block adds up: right only with fences.
    auto source = [](const char* before, const char* after) {
        return kernel("mov.u32 r2, %ctaid.x; mov.u32 r3, %nctaid.x; mul.wide.u32 d2, r2, 4; add.s64 d2, d1, d2; st.global.u32 [d2+64], r2;" + std::string(before) +
            "atom.global.add.u32 r4, [d1], 1; add.u32 r4, r4, 1; setp.ne.u32 p1, r4, r3; @p1 ret;" + after +
            "mov.u32 r5, 0; mov.u32 r6, 0; LOOP: mul.wide.u32 d3, r5, 4; add.s64 d3, d1, d3; ld.global.u32 r7, [d3+64]; add.u32 r6, r6, r7; add.u32 r5, r5, 1; setp.lt.u32 p2, r5, r3; @p2 bra LOOP; st.global.u32 [d1+4], r6;");
    };
    passes(source("membar.gl;", "membar.gl;"), {8, 1});
    passes(source("fence.acq_rel.gpu;", "fence.acq_rel.gpu;"), {8, 1});
    std::string plain = source("", ""), ordered = plain, relaxed = plain;
    ordered.replace(ordered.find("atom.global"), 11, "atom.acq_rel.gpu.global");
    relaxed.replace(relaxed.find("atom.global"), 11, "atom.relaxed.gpu.global");
    passes(ordered, {8, 1});
    expectFault(relaxed, 719, {"race between blocks"}, {8, 1});
    expectFault(source("", "membar.gl;"), 719, {"race between blocks"}, {8, 1});
    expectFault(source("membar.gl;", ""), 719, {"race between blocks"}, {8, 1});
    expectFault(source("membar.cta;", "membar.gl;"), 719, {"race between blocks"}, {8, 1});
}

MOCK(flagsBetweenBlocks) {
    // Block 0 writes and raises a flag; block 1 waits for it and reads.
    auto source = [](std::string write, std::string read) {
        return kernel("mov.u32 r2, %ctaid.x; mov.u32 r3, 1; setp.ne.u32 p1, r2, 0; @p1 bra WAIT; st.global.u32 [d1+64], r3;" + write + " ret; WAIT: " + read +
            " setp.eq.u32 p2, r4, 0; @p2 bra WAIT; ld.global.u32 r5, [d1+64];");
    };
    passes(source("st.release.gpu.global.u32 [d1], r3;", "ld.acquire.gpu.global.u32 r4, [d1];"), {2, 1});
    passes(source("membar.gl; st.volatile.global.u32 [d1], r3;", "ld.volatile.global.u32 r4, [d1]; membar.gl;"), {2, 1});
    expectFault(source("st.relaxed.gpu.global.u32 [d1], r3;", "ld.acquire.gpu.global.u32 r4, [d1];"), 719, {"race between blocks: read"}, {2, 1});
    expectFault(source("st.release.gpu.global.u32 [d1], r3;", "ld.relaxed.gpu.global.u32 r4, [d1];"), 719, {"race between blocks: read"}, {2, 1});
    expectFault(source("membar.gl; st.global.u32 [d1], r3;", "ld.volatile.global.u32 r4, [d1]; membar.gl;"), 719, {"race between blocks: read"}, {2, 1});
}

// ---- lanes and warps that do not come ----

MOCK(divergentBarriers) {
    expectFault(kernel("setp.lt.u32 p1, r0, 16; @p1 bra A; bar.sync 0; ret; A: bar.sync 0;"), 719, {"divergence", "wait for each other at different instructions"});
    expectFault(kernel("setp.lt.u32 p1, r0, 32; @p1 bra A; bar.sync 0; ret; A: bar.sync 0;"), 719, {"divergent barrier"}, {1, 64});
    expectFault(kernel("setp.lt.u32 p1, r0, 32; @p1 bra A; bar.sync 1; ret; A: bar.sync 2;"), 719, {"deadlock", "warp 0 waits", "warp 1 waits"}, {1, 64});
    expectFault(kernel("setp.lt.u32 p1, r0, 32; @p1 bra A; ret; A: bar.sync 1, 64;"), 719, {"deadlock", "warp 1 has ended"}, {1, 64});
    expectFault(kernel("bar.sync 1, 33;"), 715, {"barrier 1 for 33"});
    passes(kernel("setp.lt.u32 p1, r0, 32; @p1 ret; bar.sync 0;"), {1, 64});
}
MOCK(missingLanes) {
    expectFault(kernel("setp.lt.u32 p1, r0, 16; @p1 ret; shfl.sync.bfly.b32 r2, r0, 1, 31, 0xffffffff;"), 719, {"left the kernel"});
    expectFault(kernel("setp.lt.u32 p1, r0, 16; @p1 shfl.sync.bfly.b32 r2, r0, 1, 31, 0xffffffff;"), 719, {"left the kernel"});
    expectFault(kernel("setp.lt.u32 p1, r0, 16; @p1 bra A; shfl.sync.bfly.b32 r2, r0, 1, 31, 0xffffffff; bra B; A: shfl.sync.bfly.b32 r2, r0, 1, 31, 0xffffffff; B: ret;"), 719, {"divergence", "lanes 0x0000ffff", "lanes 0xffff0000"});
    expectFault(kernel("shfl.sync.bfly.b32 r2, r0, 1, 31, 0x7fffffff;"), 719, {"lacks the lane", "thread (31,0,0)"});
    expectFault(kernel("setp.lt.u32 p1, r0, 16; selp.b32 r2, 0xffffffff, 0xffff0000, p1; bar.warp.sync r2;"), 719, {"which has another"});
    passes(kernel("setp.lt.u32 p1, r0, 16; selp.b32 r2, 0x0000ffff, 0xffff0000, p1; shfl.sync.bfly.b32 r3, r0, 1, 31, r2; bar.warp.sync r2;"));
    expectFault(kernel("setp.lt.u32 p1, r0, 16; @p1 bra A; ret; A: shfl.sync.bfly.b32 r2, r0, 16, 31, 0x0000ffff;"), 719, {"shfl from lane 16"});
    expectFault(kernel("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {r2, r3}, {r0}, {r0}, {r0, r0};"), 719, {"needs all 32 lanes"}, {1, 16});
    expectFault(kernel("setp.lt.u32 p1, r0, 16; @p1 mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {r2, r3}, {r0}, {r0}, {r0, r0}; mov.u32 r4, 0;"), 719, {"left the kernel"});
    passes(kernel("setp.lt.u32 p1, r0, 16; @p1 bra A; bra B; A: shfl.sync.bfly.b32 r2, r0, 8, 31, 0x0000ffff; B: shfl.sync.bfly.b32 r2, r0, 16, 31, 0xffffffff;"));
}
MOCK(aBarrierLeftOut) {
    std::string source = kernel(MY_WORD "st.shared.u32 [r9], r0; bar.sync 0; xor.b32 r4, r9, 128; ld.shared.u32 r5, [r4]; bar.sync 0;", buf);
    passes(source, {1, 64});
    cu.mock_drop_sync("k", 1);
    expectFault(source, 719, {"race"}, {1, 64});
    cu.mock_drop_sync("k", 2);  // one too many
    passes(source, {1, 64});
    cu.mock_drop_sync("", 0);
}
MOCK(endlessLoops) {
    cu.mock_set_max_instructions(1000000);
    expectFault(kernel("L: bra L;"), 702, {"does it end"});
    cu.mock_set_max_instructions(20000000000ull);
    expectFault(kernel("trap;"), 719, {"trap"});
}
MOCK(anyOrderOfBlocksAndWarps) {
    std::string body = "mov.u32 r2, %ctaid.x; mov.u32 r3, %ntid.x; mad.lo.u32 r4, r2, r3, r0; mov.u32 r10, buf; shl.b32 r11, r0, 2; add.u32 r10, r10, r11; st.shared.u32 [r10], r4; bar.sync 0; mov.u32 r12, 1020; sub.u32 r12, r12, r11; ld.shared.u32 r5, [r12]; mul.wide.u32 d2, r4, 4; add.s64 d2, d1, d2; st.global.u32 [d2], r5;";
    for (uint64_t seed = 0; seed < 20; seed++) {
        cu.mock_seed(seed);
        uint32_t out[1024];
        OK(launch(kernel(body, buf), nullptr, 0, out, sizeof out, {4, 256}));
        for (uint32_t i = 0; i < 1024; i++) EQUAL(out[i], (i & ~255u) + 255 - (i & 255));
    }
    cu.mock_seed(0);
}

// ---- counters ----

MOCK(counters) {
    cu.mock_clear_counters();
    uint32_t in[128] = {}, out[128];
    std::string body = "shl.b32 r9, r0, 7; mov.u32 r8, big; ld.global.v4.u32 {r2, r3, r4, r5}, [d0]; st.shared.u32 [r9], r2; bar.warp.sync 0xffffffff; ld.shared.u32 r6, [r9]; mul.wide.u32 d2, r0, 4; add.s64 d2, d1, d2; st.global.u32 [d2], r6;";
    OK(launch(kernel(body, ".shared .align 4 .b8 big[4096];"), in, sizeof in, out, 128));
    auto count = [](const char* what) { return cu.mock_counter("k", what); };
    EQUAL(count("launches"), 1u);
    EQUAL(count("global_load_bytes"), 512u);
    EQUAL(count("global_store_bytes"), 128u);
    EQUAL(count("global_requests"), 2u);
    EQUAL(count("global_sectors"), 1u + 4);
    EQUAL(count("shared_wavefronts"), 64u);
    EQUAL(count("shared_wavefronts_ideal"), 2u);
    EQUAL(count("warp_instructions"), 16u);
    EQUAL(count("lane_instructions"), 512u);
    EQUAL(cu.mock_calls("cuLaunchKernel"), 1u);
    char text[2000];
    CHECK(cu.mock_report(text, sizeof text) > 100 && std::strstr(text, "k launches 1\n"));
}

}  // namespace
