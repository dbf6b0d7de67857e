// Builder: names of a kernel to places.
#include "decoder.h"

namespace ptx {

static const std::map<std::string, std::pair<Special, int>> specialNames = {
    {"%tid.x", {Special::tidX, 4}}, {"%tid.y", {Special::tidY, 4}}, {"%tid.z", {Special::tidZ, 4}},
    {"%ntid.x", {Special::ntidX, 4}}, {"%ntid.y", {Special::ntidY, 4}}, {"%ntid.z", {Special::ntidZ, 4}},
    {"%ctaid.x", {Special::ctaidX, 4}}, {"%ctaid.y", {Special::ctaidY, 4}}, {"%ctaid.z", {Special::ctaidZ, 4}},
    {"%nctaid.x", {Special::nctaidX, 4}}, {"%nctaid.y", {Special::nctaidY, 4}}, {"%nctaid.z", {Special::nctaidZ, 4}},
    {"%laneid", {Special::laneid, 4}}, {"%warpid", {Special::warpid, 4}}, {"%nwarpid", {Special::nwarpid, 4}},
    {"%smid", {Special::smid, 4}}, {"%nsmid", {Special::nsmid, 4}}, {"%gridid", {Special::gridid, 8}},
    {"%lanemask_eq", {Special::lanemaskEq, 4}}, {"%lanemask_le", {Special::lanemaskLe, 4}},
    {"%lanemask_lt", {Special::lanemaskLt, 4}}, {"%lanemask_ge", {Special::lanemaskGe, 4}},
    {"%lanemask_gt", {Special::lanemaskGt, 4}}, {"%dynamic_smem_size", {Special::dynamicShared, 4}},
    {"%total_smem_size", {Special::totalShared, 4}},
};

static std::runtime_error wrong(int line, const std::string& what) {
    return std::runtime_error("line " + std::to_string(line) + ": " + what);
}

Builder::Builder(Kernel& k, Module& m, const std::map<std::string, ShapedVariable>& shared)
    : kernel(k), module(m), moduleShared(shared) {
    scopes.push_back({-1, {}, {}});
}

Ref Builder::newRegister(int width) {
    if (kernel.registers >= 65535) throw std::runtime_error("more than 65535 registers and constants");
    uint32_t align = width == 1 ? 4 : 64, size = width == 1 ? 4 : 32u * width;
    uint32_t at = (kernel.registerBytes + align - 1) / align * align;
    kernel.registerBytes = at + size;
    return Ref{at, uint16_t(kernel.registers++), uint8_t(width), false};
}

void Builder::declareRegister(const std::string& name, Type t) {
    int width = t == Type::pred ? 1 : bytesOf(t);
    if (width == 1 && t != Type::pred) width = 2;  // 8-bit registers hold their value in 16 bits
    scopes[current].regs[name] = newRegister(width);
    kernel.declared[typeName(t)]++;
}

void Builder::openScope() {
    scopes.push_back({current, {}, {}});
    current = int(scopes.size()) - 1;
}
void Builder::closeScope() { current = scopes[current].parent; }

void Builder::label(const std::string& name) { scopes[current].labels[name] = uint32_t(kernel.code.size()); }

void Builder::branchTo(const std::string& name, Inst& i) {
    jumps.push_back({uint32_t(kernel.code.size()), name, current, i.line});
}

void Builder::finish() {
    for (auto& j : jumps) {
        int s = j.scope;
        while (s >= 0 && !scopes[s].labels.count(j.label)) s = scopes[s].parent;
        if (s < 0) throw wrong(j.line, "no label " + j.label);
        kernel.code[j.at].target = scopes[s].labels[j.label];
    }
}

bool Builder::isRegister(const std::string& name) const {
    for (int s = current; s >= 0; s = scopes[s].parent)
        if (scopes[s].regs.count(name)) return true;
    return specialNames.count(name) > 0;
}

Ref Builder::reg(const std::string& name, int line) {
    for (int s = current; s >= 0; s = scopes[s].parent) {
        auto i = scopes[s].regs.find(name);
        if (i != scopes[s].regs.end()) return i->second;
    }
    Ref r = special(name);
    if (!r.width) throw wrong(line, "undeclared register " + name);
    return r;
}

Ref Builder::special(const std::string& name) {
    auto i = specialNames.find(name);
    if (i == specialNames.end()) return Ref{};
    auto& r = specials[name];
    if (!r.width) {
        r = newRegister(i->second.second);
        kernel.specials.push_back({r, i->second.first});
    }
    return r;
}

Ref Builder::constant(uint64_t value, int width) {
    if (width == 2) value &= 0xffff;
    if (width == 4) value &= 0xffffffff;
    if (width == 1) value = value ? 0xffffffff : 0;
    auto& r = constants[{value, width}];
    if (!r.width) {
        r = newRegister(width);
        kernel.constants.push_back({r, value});
    }
    return r;
}

Ref Builder::sinkOf(int width) { return newRegister(width); }

void Builder::declareShared(const std::string& name, ShapedVariable v) { ownShared[name] = v; }

// Static arrays that the kernel names come first; everything extern begins behind them.
void Builder::layOutShared(const std::set<std::string>& used) {
    uint32_t at = 0, align = 16;
    std::vector<std::string> external;
    auto place = [&](const std::string& name, const ShapedVariable& v) {
        if (v.external) {
            external.push_back(name);
            align = std::max(align, v.align);
            return;
        }
        at = (at + v.align - 1) / v.align * v.align;
        sharedAt[name] = at;
        at += v.size;
    };
    for (auto& [name, v] : moduleShared)
        if (used.count(name)) place(name, v);
    for (auto& [name, v] : ownShared) place(name, v);
    kernel.sharedBytes = at;
    kernel.dynamicAt = (at + align - 1) / align * align;
    kernel.dynamicShared = !external.empty();
    if (kernel.dynamicShared) kernel.sharedBytes = kernel.dynamicAt;
    for (auto& name : external) sharedAt[name] = kernel.dynamicAt;
}

bool Builder::symbol(const std::string& name, uint64_t& address, Space& space) const {
    auto s = sharedAt.find(name);
    if (s != sharedAt.end()) {
        address = s->second;
        space = Space::shared;
        return true;
    }
    auto v = module.variables.find(name);
    if (v == module.variables.end()) return false;
    address = v->second.address;
    space = v->second.space;
    return true;
}

const Param* Builder::param(const std::string& name) const {
    for (auto& p : kernel.params)
        if (p.name == name) return &p;
    return nullptr;
}

void decode(const Statement& s, Builder& b) {
    if (!decodeArithmetic(s, b) && !decodeMemory(s, b) && !decodeThreads(s, b)) throw std::runtime_error("unknown instruction");
}

}  // namespace ptx
