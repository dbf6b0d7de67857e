// Statements to instructions: which operation, which types, which registers. Strict: a modifier or an
// operand that is not understood is an error, because an ignored one would make a test meaningless.
#include <algorithm>
#include <functional>
#include <unordered_map>

#include "alu.h"
#include "half.h"
#include "parse.h"

namespace ptx {
namespace {

struct Decoder {
    const Statement& st;
    Builder& b;
    Inst inst;
    std::vector<std::string> mods;

    Decoder(const Statement& s, Builder& builder) : st(s), b(builder), mods(s.mods) {
        inst.line = s.line;
        inst.text = s.text;
        inst.opcode = s.op;
    }

    [[noreturn]] void fail(const std::string& what) {
        throw std::runtime_error("line " + std::to_string(st.line) + ": " + what);
    }

    // Later additions to the language: an assembler refuses them under an earlier .version or .target.
    void since(double version, int target = 0) {
        if (std::strtod(b.module.version.c_str(), nullptr) < version - 1e-9) fail("needs .version " + std::to_string(version).substr(0, 3));
        if (target && std::atoi(b.module.target.c_str() + std::min<size_t>(3, b.module.target.size())) < target)
            fail("needs .target sm_" + std::to_string(target));
    }

    // ---- modifiers ----
    bool take(const char* m) {
        auto i = std::find(mods.begin(), mods.end(), m);
        if (i == mods.end()) return false;
        mods.erase(i);
        return true;
    }
    void need(const char* m) {
        if (!take(m)) fail(std::string("expected .") + m);
    }
    template <class T>
    T oneOf(std::initializer_list<std::pair<const char*, T>> names) {
        for (auto& [name, value] : names)
            if (take(name)) return value;
        fail("a modifier is missing");
    }
    Type takeType() {
        for (size_t i = 0; i < mods.size(); i++) {
            Type t = typeNamed(mods[i]);
            if (t == Type::none) continue;
            mods.erase(mods.begin() + i);
            return t;
        }
        fail("a type is missing");
    }
    void rounding(bool nearestOnly = true) {
        for (auto& [name, r, integral] : std::initializer_list<std::tuple<const char*, Round, bool>>{
                 {"rn", Round::nearest, false}, {"rz", Round::zero, false}, {"rm", Round::down, false},
                 {"rp", Round::up, false}, {"rna", Round::away, false}, {"rni", Round::nearest, true},
                 {"rzi", Round::zero, true}, {"rmi", Round::down, true}, {"rpi", Round::up, true}})
            if (take(name)) {
                if (nearestOnly && r != Round::nearest) fail(std::string("rounding .") + name + " of arithmetic");
                inst.round = uint8_t(r);
                inst.roundInt = integral;
            }
    }
    void floatMods() {
        inst.ftz |= take("ftz");
        inst.sat |= take("sat");
    }

    // ---- operands ----
    void arity(size_t least, size_t most = 0) {
        if (st.args.size() < least || st.args.size() > std::max(least, most)) fail("number of operands");
    }
    const Operand& arg(size_t i) {
        if (i >= st.args.size()) fail("an operand is missing");
        return st.args[i];
    }
    // exact: a register of just this width; otherwise a wider one may be used, as ld, st and cvt allow.
    Ref source(const Operand& o, int width, bool exact = true) {
        if (o.kind == Operand::number) {
            if (width == 8 || !o.isDouble) return b.constant(o.bits, width);
            fail("a 64-bit constant");
        }
        if (o.kind != Operand::name) fail("operand kind");
        if (!b.isRegister(o.text)) {
            if (width == 1 && (o.text == "true" || o.text == "false")) return b.constant(o.text == "true", 1);
            if (o.text == "WARP_SZ") return b.constant(32, width);
            uint64_t address;
            Space space;
            if (b.param(o.text)) fail("the address of a parameter");
            if (!b.symbol(o.text, address, space)) fail("no register or variable " + o.text);
            if (width < 4) fail("an address in " + std::to_string(width) + " bytes");
            return b.constant(address + o.offset, width);
        }
        Ref r = b.reg(o.text, st.line);
        checkWidth(r, width, exact, o.text);
        if (o.negated && r.width != 1) fail("! before " + o.text);
        r.negated = o.negated;
        return r;
    }
    void checkWidth(const Ref& r, int width, bool exact, const std::string& name) {
        if (exact ? r.width != width : r.width < width || r.width == 1)
            fail("register " + name + " has " + std::to_string(r.width) + " bytes, not " + std::to_string(width));
    }
    Ref dest(const Operand& o, int width, bool exact = true) {
        if (o.kind == Operand::sink) return b.sinkOf(width);
        if (o.kind != Operand::name || !b.isRegister(o.text)) fail("destination");
        Ref r = b.reg(o.text, st.line);
        checkWidth(r, width, exact, o.text);
        return r;
    }
    void addSource(Ref r) {
        if (inst.ns >= 11) fail("too many operands");
        inst.s[inst.ns++] = r;
    }
    void addSource(const Operand& o, int width, bool exact = true) { addSource(source(o, width, exact)); }
    void addDest(Ref r) {
        if (inst.nd >= 4) fail("too many destinations");
        inst.d[inst.nd++] = r;
    }
    void addDest(const Operand& o, int width, bool exact = true) { addDest(dest(o, width, exact)); }
    void addVector(const Operand& o, size_t n, int width, bool isDest) {
        if (o.kind != Operand::vector) {
            if (n != 1) fail("expected {...}");
            isDest ? addDest(o, width) : addSource(o, width);
            return;
        }
        if (o.parts.size() != n) fail("expected " + std::to_string(n) + " registers in {...}");
        for (auto& p : o.parts) isDest ? addDest(p, width) : addSource(p, width);
    }
    // [register+n], [variable+n] or [number]: the address is source 0, and Inst::offset.
    void address(const Operand& o) {
        if (o.kind != Operand::address) fail("expected [address]");
        const Operand& base = o.parts[0];
        inst.offset = o.offset;
        if (base.kind == Operand::number) {
            addSource(b.constant(base.bits, 8));
        } else if (b.isRegister(base.text)) {
            Ref r = b.reg(base.text, st.line);
            if (r.width != 8 && r.width != 4) fail("an address register of " + std::to_string(r.width) + " bytes");
            addSource(r);
        } else {
            uint64_t at;
            Space where;
            if (!b.symbol(base.text, at, where)) fail("no register or variable " + base.text);
            if (inst.space == Space::generic || inst.space != where) fail("a variable of another state space");
            addSource(b.constant(at, 8));
        }
    }
    int width(Type t) { return t == Type::pred ? 1 : std::max(2, bytesOf(t)); }

    void emit(ExecFn fn) {
        if (inst.kind == Kind::alu && !fn) fail("unknown operation or type");
        inst.fn = fn;
        emit();
    }
    void emit() {
        if (!mods.empty()) fail("unknown modifier ." + mods[0]);
        if (!st.guard.empty()) {
            inst.guarded = true;
            inst.guard = b.reg(st.guard, st.line);
            if (inst.guard.width != 1) fail("the guard is no predicate");
            inst.guard.negated = st.guardNegated;
        }
        if (inst.kind == Kind::branch) b.branchTo(st.args[0].text, inst);
        b.kernel.code.push_back(inst);
    }

    // ---- arithmetic ----
    void plain(Alu op, int sources, Taint taint = Taint::all) {
        arity(1 + sources);
        rounding();
        floatMods();
        Type t = inst.type = takeType();
        bool bf = t == Type::bf16 || t == Type::bf16x2;
        if (bf && (op == Alu::add || op == Alu::sub || op == Alu::mulLo)) since(7.8, 90);
        inst.taint = t == Type::f16x2 || t == Type::bf16x2 ? Taint::halves : isFloat(t) ? Taint::all : taint;
        addDest(arg(0), width(t));
        for (int i = 1; i <= sources; i++) addSource(arg(i), width(t));
        emit(aluFn(op, t));
    }
    void addSub(Alu op) {
        if (take("cc")) fail("carry flags");
        plain(op, 2, Taint::carry);
    }
    void mul(Alu lo, Alu hi, Alu wide, int sources) {
        if (take("lo")) return plain(lo, sources, Taint::carry);
        if (take("hi")) return plain(hi, sources);
        if (!take("wide")) {
            if (sources == 3) return plain(Alu::fma, 3);
            return plain(lo, sources);
        }
        arity(1 + sources);
        Type t = inst.type = takeType();
        int w = width(t);
        if (bytesOf(t) != 2 && bytesOf(t) != 4) fail("wide type");
        addDest(arg(0), 2 * w);
        addSource(arg(1), w);
        addSource(arg(2), w);
        if (sources == 3) addSource(arg(3), 2 * w);
        emit(aluFn(wide, t));
    }
    void divide() {
        if (!take("approx")) take("full");
        plain(Alu::div, 2);
    }
    void approx(Alu op) {
        take("approx");
        plain(op, 1);
    }
    void minMax(Alu op, Alu withNan) {
        bool nan = take("NaN");
        plain(nan ? withNan : op, 2);
    }
    void bits(Alu op, const char* predOp, int predMode, int sources) {
        if (predOp && std::find(mods.begin(), mods.end(), "pred") != mods.end()) return predLogic(predMode, sources);
        plain(op, sources, Taint::logic);
    }
    void predLogic(int mode, int sources) {
        need("pred");
        arity(1 + sources);
        inst.type = Type::pred;
        inst.taint = Taint::logic;
        inst.mode = uint8_t(mode);
        addDest(arg(0), 1);
        for (int i = 1; i <= sources; i++) addSource(arg(i), 1);
        emit(execPredLogic);
    }
    void shift(Alu op) {
        arity(3);
        Type t = inst.type = takeType();
        inst.taint = op == Alu::shl ? Taint::shiftLeft : Taint::shiftRight;
        addDest(arg(0), width(t));
        addSource(arg(1), width(t));
        addSource(arg(2), 4);
        emit(aluFn(op, t));
    }
    void count(Alu op) {  // popc, clz, bfind: a 32-bit result
        arity(2);
        if (take("shiftamt")) op = Alu::bfindShift;
        Type t = inst.type = takeType();
        addDest(arg(0), 4);
        addSource(arg(1), width(t));
        emit(aluFn(op, t));
    }
    void bitField(Alu op) {
        bool insert = op == Alu::bfi;
        arity(insert ? 5 : 4);
        Type t = inst.type = takeType();
        inst.taint = insert ? Taint::all : Taint::extract;
        addDest(arg(0), width(t));
        addSource(arg(1), width(t));
        if (insert) addSource(arg(2), width(t));
        addSource(arg(insert ? 3 : 2), 4);
        addSource(arg(insert ? 4 : 3), 4);
        emit(aluFn(op, t));
    }
    void prmt() {
        arity(4);
        need("b32");
        static const char* const modes[] = {"", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"};
        for (int i = 1; i < 7; i++)
            if (take(modes[i])) inst.mode = uint8_t(i);
        inst.taint = Taint::permute;
        addDest(arg(0), 4);
        for (int i = 1; i < 4; i++) addSource(arg(i), 4);
        emit(execPrmt);
    }
    void lop3() {
        arity(5);
        need("b32");
        inst.type = Type::b32;
        inst.taint = Taint::logic;
        addDest(arg(0), 4);
        for (int i = 1; i < 4; i++) addSource(arg(i), 4);
        if (arg(4).kind != Operand::number) fail("lop3's table");
        inst.imm = uint32_t(arg(4).bits & 255);
        emit(execLop3);
    }
    void shf() {
        arity(4);
        inst.mode = uint8_t(oneOf<int>({{"l", 0}, {"r", 1}}) | oneOf<int>({{"wrap", 0}, {"clamp", 2}}));
        need("b32");
        addDest(arg(0), 4);
        for (int i = 1; i < 4; i++) addSource(arg(i), 4);
        emit(execShf);
    }
    void dot(bool two) {
        arity(4);
        if (two) inst.mode = uint8_t(oneOf<int>({{"lo", 1}, {"hi", 2}}));
        inst.type = takeType();
        inst.type2 = takeType();
        for (Type t : {inst.type, inst.type2})
            if (t != Type::u32 && t != Type::s32) fail("type");
        addDest(arg(0), 4);
        for (int i = 1; i < 4; i++) addSource(arg(i), 4);
        emit(execDot);
    }
    void selp() {
        arity(4);
        Type t = inst.type = takeType();
        inst.taint = Taint::select;
        addDest(arg(0), width(t));
        addSource(arg(1), width(t));
        addSource(arg(2), width(t));
        addSource(arg(3), 1);
        emit(execSelp);
    }
    void slct() {
        arity(4);
        inst.ftz = take("ftz");
        Type t = inst.type = takeType();
        inst.type2 = takeType();
        if (inst.type2 != Type::s32 && inst.type2 != Type::f32) fail("type");
        addDest(arg(0), width(t));
        addSource(arg(1), width(t));
        addSource(arg(2), width(t));
        addSource(arg(3), 4);
        emit(aluFn(Alu::slct, t));
    }
    void testp() {
        arity(2);
        Alu op = oneOf<Alu>({{"finite", Alu::testFinite}, {"infinite", Alu::testInfinite},
            {"number", Alu::testNumber}, {"notanumber", Alu::testNan}, {"normal", Alu::testNormal},
            {"subnormal", Alu::testSubnormal}});
        Type t = inst.type = takeType();
        addDest(arg(0), 1);
        addSource(arg(1), width(t));
        emit(aluFn(op, t));
    }

    Compare comparison() {
        return oneOf<Compare>({{"eq", Compare::eq}, {"ne", Compare::ne}, {"lt", Compare::lt}, {"le", Compare::le},
            {"gt", Compare::gt}, {"ge", Compare::ge}, {"lo", Compare::lt}, {"ls", Compare::le}, {"hi", Compare::gt},
            {"hs", Compare::ge}, {"equ", Compare::equ}, {"neu", Compare::neu}, {"ltu", Compare::ltu},
            {"leu", Compare::leu}, {"gtu", Compare::gtu}, {"geu", Compare::geu}, {"num", Compare::num},
            {"nan", Compare::nan}});
    }
    void setp() {
        Compare c = comparison();
        inst.mode = uint8_t(take("and") ? BoolOp::bitAnd : take("or") ? BoolOp::bitOr
            : take("xor") ? BoolOp::bitXor : BoolOp::none);
        inst.ftz = take("ftz");
        Type t = inst.type = takeType();
        bool combined = BoolOp(inst.mode) != BoolOp::none;
        arity(combined ? 4 : 3);
        addDest(arg(0), 1);
        if (!arg(0).parts.empty()) addDest(arg(0).parts[0], 1);
        if (t == Type::f16x2 && inst.nd != 2) fail("two destinations wanted");
        addSource(arg(1), width(t));
        addSource(arg(2), width(t));
        if (combined) addSource(arg(3), 1);
        emit(setpFn(c, t));
    }

    // ---- moves and conversions ----
    void mov() {
        arity(2);
        Type t = inst.type = takeType();
        if (t == Type::pred) {
            mods.push_back("pred");
            return predLogic(4, 1);
        }
        int w = width(t);
        inst.taint = Taint::bytes;
        if (arg(1).kind == Operand::vector) {
            int n = int(arg(1).parts.size());
            if ((n != 2 && n != 4) || w / n < 2) fail("packing");
            addDest(arg(0), w);
            addVector(arg(1), n, w / n, false);
            return emit(execPack);
        }
        if (arg(0).kind == Operand::vector) {
            int n = int(arg(0).parts.size());
            if ((n != 2 && n != 4) || w / n < 2) fail("unpacking");
            addVector(arg(0), n, w / n, true);
            addSource(arg(1), w);
            return emit(execUnpack);
        }
        if (arg(1).text == "%clock" || arg(1).text == "%clock64" || arg(1).text == "%globaltimer") {
            inst.kind = Kind::clock;
            addDest(arg(0), w);
            return emit();
        }
        addDest(arg(0), w);
        addSource(arg(1), w);
        emit(execMov);
    }
    void cvt() {
        rounding(false);
        floatMods();
        inst.relu = take("relu");
        if (take("pack")) return cvtPack();
        inst.type = takeType();
        inst.type2 = takeType();
        if (inst.type == Type::pred || inst.type2 == Type::pred) fail("type");
        if (inst.type == Type::f16x2 || inst.type == Type::bf16x2) {
            arity(3);
            if (inst.type2 != Type::f32) fail("type");
            addDest(arg(0), 4);
            addSource(arg(1), 4);
            addSource(arg(2), 4);
            return emit(execCvtPackFloats);
        }
        arity(2);
        inst.taint = !isFloat(inst.type) && !isFloat(inst.type2) ? Taint::convert : Taint::all;
        addDest(arg(0), width(inst.type), false);
        addSource(arg(1), width(inst.type2), false);
        emit(execCvt);
    }
    void cvtPack() {
        if (!inst.sat) fail("expected .sat");
        inst.type = takeType();
        inst.type2 = takeType();
        bool narrow = inst.type == Type::u8 || inst.type == Type::s8;
        if (narrow) need("b32");
        else if (inst.type != Type::u16 && inst.type != Type::s16) fail("type");
        if (inst.type2 != Type::s32) fail("type");
        arity(narrow ? 4 : 3);
        addDest(arg(0), 4);
        for (size_t i = 1; i < st.args.size(); i++) addSource(arg(i), 4);
        emit(execCvtPackInts);
    }
    void cvta() {
        arity(2);
        bool to = take("to");
        bool shared = take("shared") || takeShared();
        if (!shared && !take("global") && !take("const")) fail("state space");
        int w = bytesOf(inst.type = takeType());
        inst.taint = Taint::bytes;
        addDest(arg(0), w);
        addSource(arg(1), w);
        inst.mode = !to;
        if (shared && w == 4) fail("a generic address in 32 bits");
        emit(shared ? execToShared : execMov);
    }
    void isspacep() {
        arity(2);
        inst.mode = uint8_t(oneOf<int>({{"shared", 1}, {"shared::cta", 1}, {"global", 0}}));
        addDest(arg(0), 1);
        addSource(arg(1), 8);
        emit(execIsShared);
    }

    // ---- memory ----
    bool takeShared() {
        if (!take("shared::cta")) return false;
        since(7.8);
        return true;
    }
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
        for (auto m : {"volatile", "relaxed", "acquire", "release", "mmio"}) inst.relaxed |= take(m);
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
        if (take("acq_rel") || inst.relaxed) inst.relaxed = false, inst.imm = 1;
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

using Handler = void (*)(Decoder&);
const std::unordered_map<std::string, Handler> handlers = {
    {"add", [](Decoder& d) { d.addSub(Alu::add); }},
    {"sub", [](Decoder& d) { d.addSub(Alu::sub); }},
    {"mul", [](Decoder& d) { d.mul(Alu::mulLo, Alu::mulHi, Alu::mulWide, 2); }},
    {"mad", [](Decoder& d) { d.mul(Alu::madLo, Alu::madHi, Alu::madWide, 3); }},
    {"mul24", [](Decoder& d) { d.need("lo"); d.plain(Alu::mul24, 2); }},
    {"mad24", [](Decoder& d) { d.need("lo"); d.plain(Alu::mad24, 3); }},
    {"sad", [](Decoder& d) { d.plain(Alu::sad, 3); }},
    {"fma", [](Decoder& d) { d.inst.relu = d.take("relu"); d.plain(Alu::fma, 3); }},
    {"div", [](Decoder& d) { d.divide(); }},
    {"rem", [](Decoder& d) { d.plain(Alu::rem, 2); }},
    {"min", [](Decoder& d) { d.minMax(Alu::min, Alu::minNan); }},
    {"max", [](Decoder& d) { d.minMax(Alu::max, Alu::maxNan); }},
    {"neg", [](Decoder& d) { d.plain(Alu::neg, 1); }},
    {"abs", [](Decoder& d) { d.plain(Alu::abs, 1); }},
    {"copysign", [](Decoder& d) { d.plain(Alu::copysign, 2); }},
    {"rcp", [](Decoder& d) { d.approx(Alu::rcp); }},
    {"sqrt", [](Decoder& d) { d.approx(Alu::sqrt); }},
    {"rsqrt", [](Decoder& d) { d.approx(Alu::rsqrt); }},
    {"ex2", [](Decoder& d) { d.approx(Alu::ex2); }},
    {"lg2", [](Decoder& d) { d.approx(Alu::lg2); }},
    {"sin", [](Decoder& d) { d.approx(Alu::sin); }},
    {"cos", [](Decoder& d) { d.approx(Alu::cos); }},
    {"tanh", [](Decoder& d) { d.approx(Alu::tanh); }},
    {"testp", [](Decoder& d) { d.testp(); }},
    {"and", [](Decoder& d) { d.bits(Alu::bitAnd, "and", 0, 2); }},
    {"or", [](Decoder& d) { d.bits(Alu::bitOr, "or", 1, 2); }},
    {"xor", [](Decoder& d) { d.bits(Alu::bitXor, "xor", 2, 2); }},
    {"not", [](Decoder& d) { d.bits(Alu::bitNot, "not", 3, 1); }},
    {"cnot", [](Decoder& d) { d.plain(Alu::cnot, 1); }},
    {"shl", [](Decoder& d) { d.shift(Alu::shl); }},
    {"shr", [](Decoder& d) { d.shift(Alu::shr); }},
    {"popc", [](Decoder& d) { d.count(Alu::popc); }},
    {"clz", [](Decoder& d) { d.count(Alu::clz); }},
    {"bfind", [](Decoder& d) { d.count(Alu::bfind); }},
    {"brev", [](Decoder& d) { d.plain(Alu::brev, 1); }},
    {"bfe", [](Decoder& d) { d.bitField(Alu::bfe); }},
    {"bfi", [](Decoder& d) { d.bitField(Alu::bfi); }},
    {"prmt", [](Decoder& d) { d.prmt(); }},
    {"lop3", [](Decoder& d) { d.lop3(); }},
    {"shf", [](Decoder& d) { d.shf(); }},
    {"dp4a", [](Decoder& d) { d.dot(false); }},
    {"dp2a", [](Decoder& d) { d.dot(true); }},
    {"selp", [](Decoder& d) { d.selp(); }},
    {"slct", [](Decoder& d) { d.slct(); }},
    {"setp", [](Decoder& d) { d.setp(); }},
    {"mov", [](Decoder& d) { d.mov(); }},
    {"cvt", [](Decoder& d) { d.cvt(); }},
    {"cvta", [](Decoder& d) { d.cvta(); }},
    {"isspacep", [](Decoder& d) { d.isspacep(); }},
    {"ld", [](Decoder& d) { d.load(); }},
    {"ldu", [](Decoder& d) { d.load(); }},
    {"st", [](Decoder& d) { d.store(); }},
    {"atom", [](Decoder& d) { d.atomic(true); }},
    {"red", [](Decoder& d) { d.atomic(false); }},
    {"prefetch", [](Decoder& d) { d.prefetch(); }},
    {"prefetchu", [](Decoder& d) { d.prefetch(); }},
    {"createpolicy", [](Decoder& d) { d.createPolicy(); }},
    {"cp", [](Decoder& d) { d.cp(); }},
    {"ldmatrix", [](Decoder& d) { d.ldmatrix(); }},
    {"movmatrix", [](Decoder& d) { d.movmatrix(); }},
    {"mma", [](Decoder& d) { d.mma(); }},
    {"shfl", [](Decoder& d) { d.shfl(); }},
    {"vote", [](Decoder& d) { d.vote(); }},
    {"redux", [](Decoder& d) { d.redux(); }},
    {"match", [](Decoder& d) { d.match(); }},
    {"activemask", [](Decoder& d) { d.activemask(); }},
    {"bar", [](Decoder& d) { d.barrier(); }},
    {"barrier", [](Decoder& d) { d.barrier(); }},
    {"membar", [](Decoder& d) { d.fence(); }},
    {"fence", [](Decoder& d) { d.fence(); }},
    {"bra", [](Decoder& d) { d.branch(); }},
    {"ret", [](Decoder& d) { d.simple(Kind::exit); }},
    {"exit", [](Decoder& d) { d.simple(Kind::exit); }},
    {"trap", [](Decoder& d) { d.simple(Kind::trap); }},
    {"nanosleep", [](Decoder& d) { d.nothing(); }},
    {"brkpt", [](Decoder& d) { d.nothing(); }},
    {"pmevent", [](Decoder& d) { d.nothing(); }},
};

}  // namespace

void decode(const Statement& s, Builder& b) {
    auto h = handlers.find(s.op);
    if (h == handlers.end()) throw std::runtime_error("unknown instruction");
    Decoder d(s, b);
    h->second(d);
}

}  // namespace ptx
