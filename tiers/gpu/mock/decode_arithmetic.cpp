// Decoding of what works lane by lane: arithmetic, bits, comparisons, moves, conversions.
#include "decoder.h"

namespace ptx {
namespace {

struct Arithmetic : Decoder {
    using Decoder::Decoder;

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
};

const std::unordered_map<std::string, void (*)(Arithmetic&)> operations = {
    {"add", [](Arithmetic& d) { d.addSub(Alu::add); }},
    {"sub", [](Arithmetic& d) { d.addSub(Alu::sub); }},
    {"mul", [](Arithmetic& d) { d.mul(Alu::mulLo, Alu::mulHi, Alu::mulWide, 2); }},
    {"mad", [](Arithmetic& d) { d.mul(Alu::madLo, Alu::madHi, Alu::madWide, 3); }},
    {"mul24", [](Arithmetic& d) { d.need("lo"); d.plain(Alu::mul24, 2); }},
    {"mad24", [](Arithmetic& d) { d.need("lo"); d.plain(Alu::mad24, 3); }},
    {"sad", [](Arithmetic& d) { d.plain(Alu::sad, 3); }},
    {"fma", [](Arithmetic& d) { d.inst.relu = d.take("relu"); d.plain(Alu::fma, 3); }},
    {"div", [](Arithmetic& d) { d.divide(); }},
    {"rem", [](Arithmetic& d) { d.plain(Alu::rem, 2); }},
    {"min", [](Arithmetic& d) { d.minMax(Alu::min, Alu::minNan); }},
    {"max", [](Arithmetic& d) { d.minMax(Alu::max, Alu::maxNan); }},
    {"neg", [](Arithmetic& d) { d.plain(Alu::neg, 1); }},
    {"abs", [](Arithmetic& d) { d.plain(Alu::abs, 1); }},
    {"copysign", [](Arithmetic& d) { d.plain(Alu::copysign, 2); }},
    {"rcp", [](Arithmetic& d) { d.approx(Alu::rcp); }},
    {"sqrt", [](Arithmetic& d) { d.approx(Alu::sqrt); }},
    {"rsqrt", [](Arithmetic& d) { d.approx(Alu::rsqrt); }},
    {"ex2", [](Arithmetic& d) { d.approx(Alu::ex2); }},
    {"lg2", [](Arithmetic& d) { d.approx(Alu::lg2); }},
    {"sin", [](Arithmetic& d) { d.approx(Alu::sin); }},
    {"cos", [](Arithmetic& d) { d.approx(Alu::cos); }},
    {"tanh", [](Arithmetic& d) { d.approx(Alu::tanh); }},
    {"testp", [](Arithmetic& d) { d.testp(); }},
    {"and", [](Arithmetic& d) { d.bits(Alu::bitAnd, "and", 0, 2); }},
    {"or", [](Arithmetic& d) { d.bits(Alu::bitOr, "or", 1, 2); }},
    {"xor", [](Arithmetic& d) { d.bits(Alu::bitXor, "xor", 2, 2); }},
    {"not", [](Arithmetic& d) { d.bits(Alu::bitNot, "not", 3, 1); }},
    {"cnot", [](Arithmetic& d) { d.plain(Alu::cnot, 1); }},
    {"shl", [](Arithmetic& d) { d.shift(Alu::shl); }},
    {"shr", [](Arithmetic& d) { d.shift(Alu::shr); }},
    {"popc", [](Arithmetic& d) { d.count(Alu::popc); }},
    {"clz", [](Arithmetic& d) { d.count(Alu::clz); }},
    {"bfind", [](Arithmetic& d) { d.count(Alu::bfind); }},
    {"brev", [](Arithmetic& d) { d.plain(Alu::brev, 1); }},
    {"bfe", [](Arithmetic& d) { d.bitField(Alu::bfe); }},
    {"bfi", [](Arithmetic& d) { d.bitField(Alu::bfi); }},
    {"prmt", [](Arithmetic& d) { d.prmt(); }},
    {"lop3", [](Arithmetic& d) { d.lop3(); }},
    {"shf", [](Arithmetic& d) { d.shf(); }},
    {"dp4a", [](Arithmetic& d) { d.dot(false); }},
    {"dp2a", [](Arithmetic& d) { d.dot(true); }},
    {"selp", [](Arithmetic& d) { d.selp(); }},
    {"slct", [](Arithmetic& d) { d.slct(); }},
    {"setp", [](Arithmetic& d) { d.setp(); }},
    {"mov", [](Arithmetic& d) { d.mov(); }},
    {"cvt", [](Arithmetic& d) { d.cvt(); }},
    {"cvta", [](Arithmetic& d) { d.cvta(); }},
    {"isspacep", [](Arithmetic& d) { d.isspacep(); }},
};

}  // namespace

bool decodeArithmetic(const Statement& s, Builder& b) {
    auto op = operations.find(s.op);
    if (op == operations.end()) return false;
    Arithmetic d(s, b);
    op->second(d);
    return true;
}

}  // namespace ptx
