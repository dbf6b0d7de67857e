// What decoding any statement needs: its modifiers taken one by one, its operands resolved and checked.
// Strict: a modifier or an operand that is not understood is an error, because an ignored one would make
// a test meaningless.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <tuple>
#include <unordered_map>

#include "alu.h"
#include "half.h"
#include "parse.h"

namespace ptx {

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
        if (b.special(o.text).width) fail(o.text + " cannot be written");
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
    bool takeShared() {
        if (!take("shared::cta")) return false;
        since(7.8);
        return true;
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
};

// Each knows some operations; false if the statement's is none of them.
bool decodeArithmetic(const Statement&, Builder&);
bool decodeMemory(const Statement&, Builder&);
bool decodeThreads(const Statement&, Builder&);

}  // namespace ptx
