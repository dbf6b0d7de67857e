// Decoding of control flow and of what lanes and warps do together.
#include "decoder.h"

namespace ptx {
namespace {

struct Threads : Decoder {
    using Decoder::Decoder;

    // ---- threads among each other ----
    void shfl() {
        need("sync");
        inst.mode = uint8_t(oneOf<ShuffleMode>({{"up", ShuffleMode::up}, {"down", ShuffleMode::down},
            {"bfly", ShuffleMode::bfly}, {"idx", ShuffleMode::idx}}));
        need("b32");
        arity(5);
        inst.kind = Kind::shuffle;
        addDest(arg(0), 4);
        if (!arg(0).parts.empty()) addDest(arg(0).parts[0], 1);
        for (int i = 1; i < 5; i++) addSource(arg(i), 4);
        emit();
    }
    void vote() {
        need("sync");
        VoteMode m = oneOf<VoteMode>({{"all", VoteMode::all}, {"any", VoteMode::any}, {"uni", VoteMode::uni},
            {"ballot", VoteMode::ballot}});
        inst.mode = uint8_t(m);
        need(m == VoteMode::ballot ? "b32" : "pred");
        arity(3);
        inst.kind = Kind::vote;
        addDest(arg(0), m == VoteMode::ballot ? 4 : 1);
        addSource(arg(1), 1);
        addSource(arg(2), 4);
        emit();
    }
    void redux() {
        need("sync");
        inst.mode = uint8_t(oneOf<AtomicOp>({{"add", AtomicOp::add}, {"min", AtomicOp::min}, {"max", AtomicOp::max},
            {"and", AtomicOp::bitAnd}, {"or", AtomicOp::bitOr}, {"xor", AtomicOp::bitXor}}));
        inst.type = takeType();
        if (bytesOf(inst.type) != 4 || isFloat(inst.type)) fail("type");
        arity(3);
        inst.kind = Kind::reduce;
        for (int i = 0; i < 3; i++) i ? addSource(arg(i), 4) : addDest(arg(i), 4);
        emit();
    }
    void match() {
        inst.mode = uint8_t(oneOf<int>({{"any", 0}, {"all", 1}}));
        need("sync");
        int w = bytesOf(inst.type = takeType());
        if (inst.type != Type::b32 && inst.type != Type::b64) fail("type");
        arity(3);
        inst.kind = Kind::match;
        addDest(arg(0), 4);
        if (!arg(0).parts.empty()) addDest(arg(0).parts[0], 1);
        addSource(arg(1), w);
        addSource(arg(2), 4);
        emit();
    }
    void activemask() {
        need("b32");
        arity(1);
        inst.kind = Kind::activeMask;
        addDest(arg(0), 4);
        emit();
    }
    void barrier() {
        take("cta");
        take("aligned");
        if (take("warp")) {
            need("sync");
            arity(1);
            inst.kind = Kind::warpBarrier;
            addSource(arg(0), 4);
            return emit();
        }
        inst.kind = Kind::blockBarrier;
        if (take("red")) {
            BarrierMode m = oneOf<BarrierMode>({{"popc", BarrierMode::popc}, {"and", BarrierMode::all}, {"or", BarrierMode::any}});
            inst.mode = uint8_t(m);
            need(m == BarrierMode::popc ? "u32" : "pred");
            arity(3, 4);
            addDest(arg(0), m == BarrierMode::popc ? 4 : 1);
            addSource(arg(st.args.size() - 1), 1);
            addSource(arg(1), 4);
            if (st.args.size() == 4) addSource(arg(2), 4);
            return emit();
        }
        bool arrive = take("arrive");
        if (!arrive) need("sync");
        inst.mode = uint8_t(arrive ? BarrierMode::arrive : BarrierMode::sync);
        arity(arrive ? 2 : 1, 2);
        for (auto& o : st.args) addSource(o, 4);
        emit();
    }
    void fence() {
        bool block = take("cta");
        inst.imm = !block;  // 1: orders memory between blocks
        while (!mods.empty()) {
            std::string m = mods.back();
            if (m != "gl" && m != "sys" && m != "gpu" && m != "acq_rel" && m != "sc") fail("unknown modifier ." + m);
            mods.pop_back();
        }
        inst.kind = Kind::fence;
        emit();
    }
    void branch() {
        take("uni");
        arity(1);
        if (arg(0).kind != Operand::name) fail("branch target");
        inst.kind = Kind::branch;
        emit();
    }
    void simple(Kind k) {
        take("uni");
        arity(0);
        inst.kind = k;
        emit();
    }
    void nothing() {}  // nanosleep, brkpt, pmevent: no effect on results
};

const std::unordered_map<std::string, void (*)(Threads&)> operations = {
    {"shfl", [](Threads& d) { d.shfl(); }},
    {"vote", [](Threads& d) { d.vote(); }},
    {"redux", [](Threads& d) { d.redux(); }},
    {"match", [](Threads& d) { d.match(); }},
    {"activemask", [](Threads& d) { d.activemask(); }},
    {"bar", [](Threads& d) { d.barrier(); }},
    {"barrier", [](Threads& d) { d.barrier(); }},
    {"membar", [](Threads& d) { d.fence(); }},
    {"fence", [](Threads& d) { d.fence(); }},
    {"bra", [](Threads& d) { d.branch(); }},
    {"ret", [](Threads& d) { d.simple(Kind::exit); }},
    {"exit", [](Threads& d) { d.simple(Kind::exit); }},
    {"trap", [](Threads& d) { d.simple(Kind::trap); }},
    {"nanosleep", [](Threads& d) { d.nothing(); }},
    {"brkpt", [](Threads& d) { d.nothing(); }},
    {"pmevent", [](Threads& d) { d.nothing(); }},
};

}  // namespace

bool decodeThreads(const Statement& s, Builder& b) {
    auto op = operations.find(s.op);
    if (op == operations.end()) return false;
    Threads d(s, b);
    op->second(d);
    return true;
}

}  // namespace ptx
