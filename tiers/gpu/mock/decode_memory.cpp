// Decoding of loads, stores, atomics, asynchronous copies and matrix instructions.
#include "decoder.h"

namespace ptx {
namespace {

struct Memory : Decoder {
    using Decoder::Decoder;

    // ---- memory ----
    void space() {
        inst.space = take("global") ? Space::global : take("shared") || takeShared() ? Space::shared
            : take("param") ? Space::param : take("const") ? Space::constant : Space::generic;
        if (take("local")) fail("local memory is refused");
    }
    // Caching and ordering hints: they change no result here.
    void hints() {
        for (auto m : {"ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "weak"}) take(m);
        for (auto m : {"L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last", "L1::no_allocate",
                 "L2::64B", "L2::128B", "L2::256B"})
            if (take(m)) since(7.4);
        inst.acquire = take("acquire");
        inst.release = take("release");
        if (take("acq_rel")) inst.acquire = inst.release = true;
        inst.relaxed = inst.acquire || inst.release;
        for (auto m : {"volatile", "relaxed", "mmio"}) inst.relaxed |= take(m);
        for (auto m : {"cta", "cluster", "gpu", "sys"}) take(m);
        if (!take("L2::cache_hint")) return;
        since(7.4);
        policyOperands = 1;
    }
    size_t policyOperands = 0;

    void vectorType() {
        if (take("v2")) inst.vec = 2;
        if (take("v4")) inst.vec = 4;
        inst.type = takeType();
        inst.size = uint8_t(inst.type == Type::f16x2 ? 4 : bytesOf(inst.type));
        if (!inst.size || inst.size * inst.vec > 16) fail("type");
    }
    void load() {
        hints();
        space();
        vectorType();
        arity(2 + policyOperands);
        inst.kind = Kind::load;
        address2(arg(1));
        int w = width(inst.type);
        if (inst.vec == 1) addDest(arg(0), w, false);
        else {
            if (arg(0).kind != Operand::vector || arg(0).parts.size() != inst.vec) fail("vector of destinations");
            for (auto& p : arg(0).parts) addDest(p, w, false);
        }
        emit();
    }
    void address2(const Operand& o) {
        if (inst.space != Space::param) return address(o);
        if (o.kind != Operand::address) fail("expected [address]");
        const Param* p = b.param(o.parts[0].text);
        if (!p) fail("no parameter " + o.parts[0].text);
        int64_t end = o.offset + inst.size * inst.vec;
        if (o.offset < 0 || end > p->size) fail("beyond the parameter");
        inst.offset = p->offset + o.offset;
        if (inst.offset % (inst.size * inst.vec)) fail("misaligned parameter access");
    }
    void store() {
        hints();
        space();
        if (inst.space == Space::param || inst.space == Space::constant) fail("a store to " + st.text);
        vectorType();
        arity(2 + policyOperands);
        inst.kind = Kind::store;
        address(arg(0));
        int w = width(inst.type);
        if (inst.vec == 1) addSource(arg(1), w, false);
        else {
            if (arg(1).kind != Operand::vector || arg(1).parts.size() != inst.vec) fail("vector of sources");
            for (auto& p : arg(1).parts) addSource(p, w, false);
        }
        emit();
    }
    void atomic(bool returns) {
        hints();
        space();
        take("noftz");
        AtomicOp op = oneOf<AtomicOp>({{"add", AtomicOp::add}, {"min", AtomicOp::min}, {"max", AtomicOp::max},
            {"inc", AtomicOp::inc}, {"dec", AtomicOp::dec}, {"and", AtomicOp::bitAnd}, {"or", AtomicOp::bitOr},
            {"xor", AtomicOp::bitXor}, {"exch", AtomicOp::exch}, {"cas", AtomicOp::cas}});
        inst.mode = uint8_t(op);
        inst.kind = Kind::atomic;
        vectorType();
        if (inst.vec != 1 || inst.size < 4) fail("type");
        if (inst.type == Type::f64 || inst.type == Type::f16x2 || (inst.type == Type::f32 && op != AtomicOp::add))
            fail("type");
        size_t r = returns, sources = op == AtomicOp::cas ? 2 : 1;
        arity(r + 1 + sources);
        if (returns) addDest(arg(0), inst.size);
        address(arg(r));
        for (size_t i = 0; i < sources; i++) addSource(arg(r + 1 + i), inst.size);
        emit();
    }
    void prefetch() {
        while (!mods.empty()) mods.pop_back();
        inst.kind = Kind::prefetch;
        emit();
    }
    void createPolicy() {
        mods.clear();
        addDest(arg(0), 8);
        addSource(b.constant(0, 8));
        inst.taint = Taint::bytes;
        emit(execMov);
    }

    // ---- asynchronous copies ----
    void cp() {
        need("async");
        if (take("commit_group")) {
            inst.kind = Kind::commitGroup;
            return emit();
        }
        if (take("wait_all")) {
            inst.kind = Kind::waitGroup;
            inst.mode = 1;
            return emit();
        }
        if (take("wait_group")) {
            arity(1);
            inst.kind = Kind::waitGroup;
            if (arg(0).kind != Operand::number) fail("wait_group's count");
            inst.imm = uint32_t(arg(0).bits);
            return emit();
        }
        bool cg = take("cg");
        if (!cg) need("ca");
        if (!take("shared") && !takeShared()) fail("expected .shared");
        need("global");
        hints();
        inst.kind = Kind::copyAsync;
        inst.space = Space::shared;
        address(arg(0));
        inst.imm = uint32_t(int32_t(inst.offset));  // the destination's offset; Inst::offset is the source's
        inst.space = Space::global;
        address(arg(1));
        if (arg(2).kind != Operand::number) fail("cp.async's size");
        inst.size = uint8_t(arg(2).bits);
        if (cg ? inst.size != 16 : inst.size != 4 && inst.size != 8 && inst.size != 16) fail("cp.async's size");
        size_t n = st.args.size() - policyOperands;
        if (n > 4 || n < 3) fail("number of operands");
        if (n == 4) {
            const Operand& o = arg(3);
            bool pred = o.kind == Operand::name && b.isRegister(o.text) && b.reg(o.text, st.line).width == 1;
            inst.mode = pred ? 2 : 1;  // ignore-src, or the number of bytes to read
            addSource(o, pred ? 1 : 4);
        }
        emit();
    }

    // ---- matrices ----
    void matrixRegisters(const Operand& o, int n) { addVector(o, n, 4, true); }
    void ldmatrix() {
        need("sync");
        need("aligned");
        need("m8n8");
        inst.vec = uint8_t(oneOf<int>({{"x1", 1}, {"x2", 2}, {"x4", 4}}));
        inst.trans = take("trans");
        inst.space = take("shared") || takeShared() ? Space::shared : Space::generic;
        need("b16");
        arity(2);
        inst.kind = Kind::loadMatrix;
        matrixRegisters(arg(0), inst.vec);
        address(arg(1));
        emit();
    }
    void movmatrix() {
        since(7.8);
        need("sync");
        need("aligned");
        need("m8n8");
        need("trans");
        need("b16");
        arity(2);
        inst.kind = Kind::moveMatrix;
        addDest(arg(0), 4);
        addSource(arg(1), 4);
        emit();
    }
    void mma() {
        need("sync");
        need("aligned");
        struct Shape { const char* name; int m, k; };
        static const Shape shapes[] = {{"m16n8k32", 16, 32}, {"m16n8k16", 16, 16}, {"m16n8k8", 16, 8}, {"m8n8k16", 8, 16}};
        const Shape* shape = nullptr;
        for (auto& s : shapes)
            if (take(s.name)) shape = &s;
        if (!shape) fail("unknown shape");
        need("row");
        need("col");
        inst.sat = take("satfinite");
        Type d = takeType(), a = takeType(), bt = takeType(), c = takeType();
        inst.type = a;
        inst.type2 = bt;
        bool ints = (a == Type::s8 || a == Type::u8) && (bt == Type::s8 || bt == Type::u8);
        bool halves = (a == Type::f16 || a == Type::bf16) && a == bt;
        int m = shape->m, k = shape->k;
        if (ints ? d != Type::s32 || c != d || k < 16
                 : !halves || m != 16 || k > 16 || c != d || (d != Type::f32 && (d != Type::f16 || a != Type::f16)))
            fail("types of mma");
        if (inst.sat && !ints) fail("satfinite");
        if (!ints && d == Type::f16) inst.mode = 1;  // accumulators are f16x2
        inst.kind = Kind::mma;
        inst.vec = uint8_t(m);
        inst.imm = uint32_t(k);
        int bytes = ints ? 1 : 2, accumulators = m * 8 / 32 / (inst.mode ? 2 : 1);
        arity(4);
        matrixRegisters(arg(0), accumulators);
        addVector(arg(1), m * k * bytes / 128, 4, false);
        addVector(arg(2), 8 * k * bytes / 128, 4, false);
        addVector(arg(3), accumulators, 4, false);
        emit();
    }
};

const std::unordered_map<std::string, void (*)(Memory&)> operations = {
    {"ld", [](Memory& d) { d.load(); }},
    {"ldu", [](Memory& d) { d.load(); }},
    {"st", [](Memory& d) { d.store(); }},
    {"atom", [](Memory& d) { d.atomic(true); }},
    {"red", [](Memory& d) { d.atomic(false); }},
    {"prefetch", [](Memory& d) { d.prefetch(); }},
    {"prefetchu", [](Memory& d) { d.prefetch(); }},
    {"createpolicy", [](Memory& d) { d.createPolicy(); }},
    {"cp", [](Memory& d) { d.cp(); }},
    {"ldmatrix", [](Memory& d) { d.ldmatrix(); }},
    {"movmatrix", [](Memory& d) { d.movmatrix(); }},
    {"mma", [](Memory& d) { d.mma(); }},
};

}  // namespace

bool decodeMemory(const Statement& s, Builder& b) {
    auto op = operations.find(s.op);
    if (op == operations.end()) return false;
    Memory d(s, b);
    op->second(d);
    return true;
}

}  // namespace ptx
