// What the parser hands to the decoder: statements with their operands, and a kernel under
// construction that gives names their registers.
#pragma once
#include <set>

#include "lex.h"
#include "ptx.h"

namespace ptx {

struct Operand {
    enum Kind { name, number, address, vector, sink } kind = name;
    std::string text;            // of a name
    bool negated = false;        // !p
    uint64_t bits = 0;           // of a number
    bool isDouble = false;       // the number was written as 0d...
    int64_t offset = 0;          // name+4, [name+4]
    std::vector<Operand> parts;  // a vector's elements; an address's base; the q of p|q
};

struct Statement {
    int line = 0;
    std::string text, op;           // op is the first word: "fma"
    std::vector<std::string> mods;  // the others: "rn", "f32"
    std::string guard;
    bool guardNegated = false;
    std::vector<Operand> args;
};

struct ShapedVariable { uint32_t align = 1, size = 0; bool external = false; };

// A kernel being built.
struct Builder {
    Kernel& kernel;
    Module& module;
    const std::map<std::string, ShapedVariable>& moduleShared;

    Builder(Kernel& k, Module& m, const std::map<std::string, ShapedVariable>& shared);

    void declareRegister(const std::string& name, Type);
    void declareShared(const std::string& name, ShapedVariable);
    void openScope();
    void closeScope();
    void label(const std::string& name);
    void branchTo(const std::string& name, Inst&);  // resolved by finish
    void finish();                                  // throws if a label is missing
    void layOutShared(const std::set<std::string>& used);

    Ref reg(const std::string& name, int line);     // a declared register
    bool isRegister(const std::string& name) const;
    Ref constant(uint64_t value, int width);
    Ref special(const std::string& name);           // width 0 if it is none
    Ref sinkOf(int width);
    bool symbol(const std::string& name, uint64_t& address, Space& space) const;
    const Param* param(const std::string& name) const;

private:
    struct Scope { int parent; std::map<std::string, Ref> regs; std::map<std::string, uint32_t> labels; };
    struct Jump { uint32_t at; std::string label; int scope, line; };
    std::vector<Scope> scopes;
    int current = 0;
    std::vector<Jump> jumps;
    std::map<std::pair<uint64_t, int>, Ref> constants;
    std::map<std::string, Ref> specials;
    std::map<std::string, ShapedVariable> ownShared;
    std::map<std::string, uint32_t> sharedAt;

    Ref newRegister(int width);
};

// Appends the statement's instruction to the kernel. Throws std::runtime_error if it is not known.
void decode(const Statement&, Builder&);

}  // namespace ptx
