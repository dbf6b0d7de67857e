// The grammar of a module: directives, declarations, and the statements of kernels' bodies.
#include "parse.h"

#include <cstdlib>

#include "half.h"

namespace ptx {

static const struct { const char* name; Type type; int bytes; bool isSigned, isFloat; } types[] = {
    {"none", Type::none, 0, false, false}, {"u8", Type::u8, 1, false, false}, {"u16", Type::u16, 2, false, false},
    {"u32", Type::u32, 4, false, false}, {"u64", Type::u64, 8, false, false}, {"s8", Type::s8, 1, true, false},
    {"s16", Type::s16, 2, true, false}, {"s32", Type::s32, 4, true, false}, {"s64", Type::s64, 8, true, false},
    {"b8", Type::b8, 1, false, false}, {"b16", Type::b16, 2, false, false}, {"b32", Type::b32, 4, false, false},
    {"b64", Type::b64, 8, false, false}, {"f16", Type::f16, 2, true, true}, {"bf16", Type::bf16, 2, true, true},
    {"f16x2", Type::f16x2, 4, true, true}, {"bf16x2", Type::bf16x2, 4, true, true}, {"f32", Type::f32, 4, true, true},
    {"f64", Type::f64, 8, true, true}, {"pred", Type::pred, 0, false, false},
};

Type typeNamed(const std::string& name) {
    for (auto& t : types)
        if (name == t.name) return t.type;
    return Type::none;
}
const char* typeName(Type t) { return types[int(t)].name; }
int bytesOf(Type t) { return types[int(t)].bytes; }
bool isSigned(Type t) { return types[int(t)].isSigned; }
bool isFloat(Type t) { return types[int(t)].isFloat; }

const char* kindName(Kind k) {
    static const char* const names[] = {
        "alu", "branch", "exit", "trap", "load", "store", "atomic", "prefetch", "cp.async", "cp.async.commit",
        "cp.async.wait", "ldmatrix", "movmatrix", "mma", "shfl", "vote", "redux", "match", "bar.warp",
        "bar", "fence", "activemask", "clock",
    };
    return names[int(k)];
}

namespace {

struct Parser {
    const std::string& src;
    std::vector<Token> tokens;
    size_t at = 0;
    Placer* placer;
    std::shared_ptr<Module> module = std::make_shared<Module>();
    std::map<std::string, ShapedVariable> shared;
    std::string complaints;

    Parser(const std::string& s, Placer* p) : src(s), tokens(lex(s)), placer(p) {}

    const Token& peek(int k = 0) const { return tokens[std::min(at + k, tokens.size() - 1)]; }
    const Token& next() { return tokens[at + 1 < tokens.size() ? at++ : at]; }
    bool accept(const char* s) { return peek().is(s) && (next(), true); }
    void expect(const char* s) {
        if (!accept(s)) fail(std::string("expected ") + s + ", found '" + peek().text + "'");
    }
    [[noreturn]] void fail(const std::string& what) {
        throw std::runtime_error("line " + std::to_string(peek().line) + ": " + what);
    }
    void complain(const std::string& what) { complaints += (complaints.empty() ? "" : "\n") + what; }
    void skipLine() {
        for (int line = peek().line; peek().line == line && peek().kind != Token::end;) next();
    }
    void skipStatement() {
        while (peek().kind != Token::end && !accept(";")) next();
    }
    void skipBraces() {
        expect("{");
        for (int depth = 1; depth && peek().kind != Token::end; next()) depth += peek().is("{") ? 1 : peek().is("}") ? -1 : 0;
    }

    // ---- numbers ----
    static bool isNumber(const Token& t) { return t.kind == Token::word && std::isdigit((unsigned char)t.text[0]); }

    void number(Operand& o) {
        bool minus = accept("-");
        std::string s = next().text;
        o.kind = Operand::number;
        auto all = [&](size_t n) { return s.size() == n + 2 && s.find_first_not_of("0123456789abcdefABCDEF", 2) == s.npos; };
        char c = s.size() > 1 ? s[1] : ' ';
        if (s[0] == '0' && (c == 'f' || c == 'F') && all(8)) {
            o.bits = std::strtoul(s.c_str() + 2, nullptr, 16);
            if (minus) o.bits ^= 0x80000000u;
        } else if (s[0] == '0' && (c == 'd' || c == 'D') && all(16)) {
            o.bits = std::strtoull(s.c_str() + 2, nullptr, 16);
            o.isDouble = true;
            if (minus) o.bits ^= 1ull << 63;
        } else {
            if (!s.empty() && (s.back() == 'U' || s.back() == 'u')) s.pop_back();
            bool binary = c == 'b' || c == 'B';
            char* stop;
            const char* first = s.c_str() + (binary ? 2 : 0);
            o.bits = std::strtoull(first, &stop, binary ? 2 : 0);
            if (*stop || stop == first) {
                at--;
                fail("number '" + s + "'");
            }
            if (minus) o.bits = 0 - o.bits;
        }
    }
    uint32_t integer() {
        Operand o;
        number(o);
        return uint32_t(o.bits);
    }

    // ---- operands ----
    Operand operand() {
        Operand o;
        if (accept("{")) {
            o.kind = Operand::vector;
            while (!accept("}")) {
                o.parts.push_back(operand());
                if (!peek().is("}")) expect(",");
            }
        } else if (accept("[")) {
            o.kind = Operand::address;
            o.parts.push_back(operand());
            o.offset = o.parts[0].offset;
            o.parts[0].offset = 0;
            if (accept(",")) fail("an address with coordinates");
            expect("]");
        } else if (peek().is("-") || isNumber(peek())) {
            number(o);
        } else {
            o.negated = accept("!");
            if (peek().kind != Token::word) fail("operand '" + peek().text + "'");
            o.text = next().text;
            o.kind = o.text == "_" ? Operand::sink : Operand::name;
            if (accept("|")) o.parts.push_back(operand());
            if (peek().is("+") || (peek().is("-") && isNumber(peek(1)))) {
                bool plus = accept("+");
                Operand n;
                number(n);
                o.offset = int64_t(n.bits);
                (void)plus;
            }
        }
        return o;
    }

    Statement statement() {
        Statement s;
        s.line = peek().line;
        size_t begin = peek().begin;
        if (accept("@")) {
            s.guardNegated = accept("!");
            s.guard = next().text;
        }
        if (peek().kind != Token::word) fail("statement '" + peek().text + "'");
        std::string op = next().text;
        for (size_t p = 0, e; p <= op.size(); p = e + 1) {
            e = std::min(op.find('.', p), op.size());
            if (!p) s.op = op.substr(0, e);
            else s.mods.push_back(op.substr(p, e - p));
        }
        if (s.op == "call") fail("call: functions are refused, inline them");
        if (!peek().is(";")) do s.args.push_back(operand()); while (accept(","));
        s.text = src.substr(begin, peek().begin - begin);
        for (auto& c : s.text)
            if (c == '\n' || c == '\t') c = ' ';
        expect(";");
        return s;
    }

    // ---- declarations ----
    // ".align 4 .b8 name[128] = {...}", after the state space. In params the name comes last.
    struct Declared { std::string name; Type type = Type::none; uint32_t align = 0, count = 1; bool unsized = false; };
    Declared declaration() {
        Declared d;
        while (peek().kind == Token::word && peek().text[0] == '.') {
            std::string w = next().text;
            if (w == ".align") d.align = integer();
            else if (w == ".ptr") d.align = d.align ? d.align : 0;
            else if (w == ".v2" || w == ".v4") fail("vector variables");
            else if (typeNamed(w.substr(1)) != Type::none) {
                if (d.type == Type::none) d.type = typeNamed(w.substr(1));
            } else if (w != ".global" && w != ".const" && w != ".shared" && w != ".visible") fail("directive " + w);
            if (w == ".ptr") {  // .ptr .global .align 4: about what is pointed to
                while (peek().kind == Token::word && peek().text[0] == '.')
                    if (next().text == ".align") integer();
            }
        }
        if (d.type == Type::none) fail("a declaration without a type");
        d.name = next().text;
        while (accept("[")) {
            if (accept("]")) d.unsized = true;
            else {
                d.count *= integer();
                expect("]");
            }
        }
        if (!d.align) d.align = bytesOf(d.type);
        return d;
    }

    ShapedVariable sharedShape(const Declared& d, bool external) {
        if (d.unsized && !external) fail("shared array without a size");
        return {d.align, d.unsized ? 0 : d.count * uint32_t(bytesOf(d.type)), external};
    }

    void variable(Space space) {
        Declared d = declaration();
        Variable v{d.name, space, d.align, d.count * uint32_t(bytesOf(d.type)), {}, 0};
        v.init.resize(v.size);
        if (accept("=")) {
            uint32_t n = 0, width = bytesOf(d.type);
            std::vector<Operand> flat;
            flatten(operand(), flat);
            for (auto& o : flat) {
                if (o.kind != Operand::number) fail("an initialiser that is no number");
                if (n + width > v.size) fail("too many initialisers");
                std::memcpy(&v.init[n], &o.bits, width);
                n += width;
            }
        }
        expect(";");
        v.address = placer ? placer->place(v) : 0x100000000000ull;
        module->variables[v.name] = v;
    }
    static void flatten(const Operand& o, std::vector<Operand>& out) {
        if (o.kind != Operand::vector) out.push_back(o);
        else for (auto& p : o.parts) flatten(p, out);
    }

    // ---- kernels ----
    void params(Kernel& k) {
        if (!accept("(")) return;
        while (!accept(")")) {
            if (!accept(".param")) fail("expected .param, found '" + peek().text + "'");
            Declared d = declaration();
            uint32_t size = d.count * bytesOf(d.type);
            k.paramBytes = (k.paramBytes + d.align - 1) / d.align * d.align;
            k.params.push_back({d.name, k.paramBytes, size});
            k.paramBytes += size;
            if (!peek().is(")")) expect(",");
        }
    }

    void tuning(Kernel& k) {
        while (peek().kind == Token::word && peek().text[0] == '.') {
            std::string w = next().text;
            uint32_t n = 1;
            do n *= integer(); while (accept(","));
            if (w == ".maxntid") k.maxThreads = n;
            else if (w == ".reqntid") k.maxThreads = k.reqThreads = n;
            else if (w == ".minnctapersm") k.minBlocks = n;
            else if (w != ".maxnreg") fail("directive " + w);
        }
    }

    void registers(Builder& b) {
        Type t = typeNamed(next().text.substr(1));
        if (t == Type::none) fail("register type");
        do {
            std::string name = next().text;
            if (accept("<")) {
                uint32_t n = integer();
                expect(">");
                for (uint32_t i = 0; i < n; i++) b.declareRegister(name + std::to_string(i), t);
            } else {
                b.declareRegister(name, t);
            }
        } while (accept(","));
        expect(";");
    }

    // Which shared arrays of the module a body names, and its own.
    std::set<std::string> namesIn(size_t from) const {
        std::set<std::string> names;
        int depth = 0;
        for (size_t i = from; i < tokens.size(); i++) {
            depth += tokens[i].is("{") ? 1 : tokens[i].is("}") ? -1 : 0;
            if (!depth) break;
            if (tokens[i].kind == Token::word) names.insert(tokens[i].text);
        }
        return names;
    }

    void ownShared(Builder& b, size_t from) {
        size_t keep = at;
        at = from;
        int depth = 0;
        do {
            depth += peek().is("{") ? 1 : peek().is("}") ? -1 : 0;
            if (peek().is(".shared") && depth) {
                next();
                Declared d = declaration();
                b.declareShared(d.name, sharedShape(d, false));
            } else {
                next();
            }
        } while (depth && peek().kind != Token::end);
        at = keep;
    }

    void entry() {
        auto k = std::make_shared<Kernel>();
        k->name = next().text;
        params(*k);
        tuning(*k);
        if (accept(";")) return;  // a declaration
        Builder b(*k, *module, shared);
        ownShared(b, at);
        b.layOutShared(namesIn(at));
        expect("{");
        for (int depth = 1; depth;) {
            try {
                if (peek().kind == Token::end) return complain("kernel " + k->name + ": no closing brace");
                depth += step(b);
            } catch (std::runtime_error& e) {
                complain("kernel " + k->name + ": " + e.what());
                skipStatement();
            }
        }
        try {
            Statement ret;
            ret.op = "ret";
            ret.text = "(end of the kernel)";
            ret.line = tokens[at - 1].line;
            decode(ret, b);
            b.finish();
        } catch (std::runtime_error& e) {
            complain("kernel " + k->name + ": " + e.what());
        }
        module->kernels[k->name] = k;
    }

    // One thing of a body; returns how the depth of braces changes.
    int step(Builder& b) {
        if (accept("{")) return b.openScope(), 1;
        if (accept("}")) return b.closeScope(), -1;
        if (accept(";")) return 0;
        const Token& t = peek();
        if (t.kind == Token::word && peek(1).is(":")) {
            b.label(next().text);
            next();
        } else if (t.is(".loc") || t.is(".file")) {
            skipLine();
        } else if (t.is(".pragma") || t.is(".shared")) {
            skipStatement();
        } else if (accept(".reg")) {
            registers(b);
        } else if (t.is(".local")) {
            fail(".local: local memory is refused, keep it in registers (is an array indexed by a variable?)");
        } else if (t.kind == Token::word && t.text[0] == '.') {
            fail("directive " + t.text);
        } else {
            Statement s = statement();
            try {
                decode(s, b);
            } catch (std::runtime_error& e) {
                std::string what = e.what();
                if (what.compare(0, 5, "line ")) what = "line " + std::to_string(s.line) + ": " + what;
                complain("kernel " + b.kernel.name + ": " + what + ": " + s.text);
            }
        }
        return 0;
    }

    void topLevel() {
        const Token t = peek();
        bool external = false;
        if (t.is(".version")) {
            next();
            module->version = next().text;
        } else if (t.is(".target")) {
            next();
            module->target = next().text;
            skipLineOf(t);
        } else if (t.is(".address_size") || t.is(".file") || t.is(".loc")) {
            skipLine();
        } else if (t.is(".section")) {
            while (!peek().is("{") && peek().kind != Token::end) next();
            skipBraces();
        } else if (accept(";")) {
        } else {
            while (peek().is(".visible") || peek().is(".extern") || peek().is(".weak") || peek().is(".common"))
                external |= next().is(".extern");
            if (accept(".entry")) {
                entry();
            } else if (accept(".shared")) {
                Declared d = declaration();
                shared[d.name] = sharedShape(d, external && d.unsized);
                expect(";");
            } else if (accept(".global")) {
                if (external) fail("an extern variable in global memory");
                variable(Space::global);
            } else if (accept(".const")) {
                variable(Space::constant);
            } else if (peek().is(".func")) {
                complain("line " + std::to_string(peek().line) + ": .func: functions are refused, inline them");
                while (!peek().is("{") && !peek().is(";") && peek().kind != Token::end) next();
                if (peek().is("{")) skipBraces();
            } else {
                fail("'" + peek().text + "' at module scope");
            }
        }
    }
    void skipLineOf(const Token& t) {
        while (peek().line == t.line && peek().kind != Token::end) next();
    }

    std::shared_ptr<Module> run() {
        try {
            while (peek().kind != Token::end) topLevel();
        } catch (std::runtime_error& e) {
            complain(e.what());
        }
        if (module->version.empty()) complain("no .version: not PTX");
        if (!complaints.empty()) throw ParseError(complaints);
        return module;
    }
};

}  // namespace

std::shared_ptr<Module> parse(const std::string& source, Placer* placer) { return Parser(source, placer).run(); }

}  // namespace ptx
