// A PTX module as the interpreter holds it: kernels whose instructions are decoded once, with every
// operand resolved to a place in the register file.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

enum class Type : uint8_t {
    none, u8, u16, u32, u64, s8, s16, s32, s64, b8, b16, b32, b64,
    f16, bf16, f16x2, bf16x2, f32, f64, pred,
};
Type typeNamed(const std::string& name);  // Type::none if there is no such type
const char* typeName(Type);
int bytesOf(Type);                        // of a value in memory; 0 for pred and none
bool isSigned(Type);
bool isFloat(Type);

enum class Space : uint8_t { generic, global, shared, param, constant };

// What the warp has to do about an instruction, beyond calling its function.
enum class Kind : uint8_t {
    alu,         // lane-wise: destinations depend on sources of the same lane only
    branch, exit, trap,
    load, store, atomic, prefetch,
    copyAsync, commitGroup, waitGroup,
    loadMatrix, moveMatrix, mma,             // aligned: need the whole warp
    shuffle, vote, reduce, match,            // need the lanes of their member mask
    warpBarrier, blockBarrier, fence,
    activeMask, clock,
};
const char* kindName(Kind);

// A register: 32 lanes at a byte offset of the warp's register file. Immediates, symbols and special
// registers are registers too, filled before a kernel starts. Predicates are one 32-bit lane mask.
struct Ref {
    uint32_t at = 0;
    uint16_t reg = 0;
    uint8_t width = 0;  // bytes of a lane; 1: predicate
    bool negated = false;
};

struct Warp;
struct Inst;
using ExecFn = void (*)(Warp&, const Inst&, uint32_t mask);

enum class AtomicOp : uint8_t { add, min, max, inc, dec, bitAnd, bitOr, bitXor, exch, cas };
enum class ShuffleMode : uint8_t { up, down, bfly, idx };
enum class VoteMode : uint8_t { all, any, uni, ballot };
enum class BarrierMode : uint8_t { sync, arrive, popc, all, any };

// How undefined bytes of sources reach the destination of an alu instruction (poison.cpp).
enum class Taint : uint8_t {
    all,      // any undefined byte makes everything undefined
    bytes,    // mov, pack, unpack, cvt between f16x2 halves ...: bytes keep their order
    logic,    // and, or, xor, not, lop3: bits are independent
    carry,    // add, sub, mul.lo: from the lowest undefined byte upwards
    select, shiftLeft, shiftRight, permute, extract, convert,
    halves,   // f16x2: two independent halves
};

struct Inst {
    Kind kind = Kind::alu;
    Taint taint = Taint::all;
    Space space = Space::generic;
    Type type = Type::none, type2 = Type::none;
    uint8_t vec = 1;         // elements of a load or store; registers of ldmatrix
    uint8_t size = 0;        // bytes of one element in memory; of a cp.async
    uint8_t mode = 0;        // an enumerator that belongs to the kind
    uint8_t round = 0;       // Round
    bool roundInt = false;   // cvt: to an integral value
    bool ftz = false, sat = false;
    bool relaxed = false;    // volatile, relaxed, acquire ...: not a plain access in races
    bool acquire = false, release = false;
    bool trans = false;      // ldmatrix.trans
    bool relu = false;
    bool guarded = false;
    uint8_t nd = 0, ns = 0;
    uint32_t imm = 0;        // lop3's table, wait_group's count, ...
    uint32_t target = 0;     // branch
    int64_t offset = 0;      // added to the address s[0]
    ExecFn fn = nullptr;
    Ref guard;
    Ref d[4], s[11];
    int line = 0;
    std::string text;        // as in the source
    std::string opcode;
};

struct Param { std::string name; uint32_t offset, size; };

struct Constant { Ref ref; uint64_t value; };

// Where a special register's value comes from when a block starts.
enum class Special : uint8_t {
    tidX, tidY, tidZ, ntidX, ntidY, ntidZ, ctaidX, ctaidY, ctaidZ, nctaidX, nctaidY, nctaidZ,
    laneid, warpid, nwarpid, smid, nsmid, gridid,
    lanemaskEq, lanemaskLe, lanemaskLt, lanemaskGe, lanemaskGt, dynamicShared, totalShared,
};
struct SpecialUse { Ref ref; Special which; };

struct Kernel {
    std::string name;
    std::vector<Inst> code;
    std::vector<Param> params;
    uint32_t paramBytes = 0;
    std::vector<Constant> constants;
    std::vector<SpecialUse> specials;
    uint32_t registers = 0;       // all of them, constants included
    uint32_t registerBytes = 0;   // of a warp
    std::map<std::string, int> declared;  // registers that instructions name, by type
    uint32_t sharedBytes = 0;     // static
    bool dynamicShared = false;
    uint32_t dynamicAt = 0;       // where extern shared begins
    uint32_t maxThreads = 0, minBlocks = 0, reqThreads = 0;
};

// A variable of module scope, which lives in device memory.
struct Variable {
    std::string name;
    Space space;
    uint32_t align, size;
    std::vector<uint8_t> init;  // size bytes; zeros where the source says nothing
    uint64_t address = 0;
};

struct Module {
    std::string version, target;
    std::map<std::string, std::shared_ptr<Kernel>> kernels;
    std::map<std::string, Variable> variables;
};

// What is wrong with a source: every complaint on a line of its own.
struct ParseError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Gives a variable its address.
struct Placer {
    virtual uint64_t place(const Variable&) = 0;
    virtual ~Placer() = default;
};

// Parses and decodes a module. Without a placer variables get addresses that must not be used.
// Throws ParseError that lists everything unknown or refused.
std::shared_ptr<Module> parse(const std::string& source, Placer* placer = nullptr);

// The generic address window of shared memory. No device or host pointer has these bits.
constexpr uint64_t sharedWindow = 0x00f0000000000000ull;
constexpr uint64_t sharedWindowBytes = 1u << 24;

}  // namespace ptx
