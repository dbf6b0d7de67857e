// Command gen writes the assembly of package kernels: `go run . -isa avx512 -out FILE -stubs FILE`.
// It is a module of its own, so that what it needs is no dependency of the
// daemon. The Go loops in ../plain.go say what each function computes.
package main

import (
	"flag"
	"fmt"
	"os"
	"strings"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// isa is an instruction set, and how kernels are cut for it.
type isa struct {
	suffix string // of the functions' names
	lanes  int    // floats in a vector
	rows   int    // query rows that share what is loaded once
}

var isas = map[string]isa{
	"avx512": {"AVX512", 16, 4},
	"avx2":   {"AVX2", 8, 2},
	"amx":    {"AMX", 16, 4},
}

func main() {
	name := flag.String("isa", "", "amx, avx512 or avx2")
	flag.Parse()
	v, ok := isas[*name]
	if !ok {
		fmt.Fprintln(os.Stderr, "gen: -isa is amx, avx512 or avx2")
		os.Exit(2)
	}
	ConstraintExpr("amd64")
	if *name == "amx" {
		shapes := v.tileShapes()
		v.scoreLeafTiles(shapes)
		v.addValueTiles(shapes)
		Generate()
		return
	}
	for _, e := range elements {
		if e.size > 1 { // of bytes there are dotsWords
			v.dots(e)
		}
		v.axpys(e)
	}
	v.toWords()
	v.dotsWords()
	v.weights()
	v.largest()
	v.gains()
	v.leafWeights()
	v.sumRuns()
	v.masses()
	v.presences()
	v.depths()
	v.roots()
	v.multiply()
	v.squaresInt8()
	v.weigh()
	v.readValueScales()
	v.addValues()
	v.scoreLeaves()
	v.fold(false)
	v.fold(true)
	v.readBins()
	v.binSquares()
	v.addBins()
	v.unpackKeys()
	v.sumCodes()
	v.dot()
	v.gatherDots()
	v.matMul()
	v.gatherAxpy()
	v.addRows()
	v.deviations()
	v.extremes()
	v.quantise()
	v.quantiseBlock()
	v.hadamard()
	v.widenBF16()
	v.sweep()
	v.prefetch()
	Generate()
}

// function begins an assembly function with the arguments args.
func (v isa) function(name, args string) {
	TEXT(name+v.suffix, NOSPLIT, "func("+args+")")
	Pragma("noescape")
}

// end ends it.
func end() {
	VZEROUPPER()
	RET()
}

// param loads an argument into a register of its own.
func param(name string) reg.GPVirtual {
	r := GP64()
	Load(Param(name), r)
	return r
}

// vec returns a new vector register.
func (v isa) vec() reg.VecVirtual {
	if v.lanes == 16 {
		return ZMM()
	}
	return YMM()
}

// zeros returns n vectors of zeros.
func (v isa) zeros(n int) []reg.VecVirtual {
	out := make([]reg.VecVirtual, n)
	for i := range out {
		out[i] = v.vec()
		v.zero(out[i])
	}
	return out
}

// zero clears x; of this instruction avo knows that it does not read x.
func (v isa) zero(x reg.VecVirtual) { VXORPS(x, x, x) }

// and is x &= y.
func (v isa) and(y Op, x reg.VecVirtual) { v.andOf(y, x, x) }

// andOf is z = x & y.
func (v isa) andOf(x, y, z Op) {
	if v.lanes == 16 {
		VPANDD(x, y, z)
	} else {
		VPAND(x, y, z)
	}
}

// or is x |= y.
func (v isa) or(y Op, x reg.VecVirtual) {
	if v.lanes == 16 {
		VPORD(y, x, x)
	} else {
		VPOR(y, x, x)
	}
}

// shift makes y of words of x, so many bits higher.
func (v isa) shift(x reg.VecVirtual, up int, y reg.VecVirtual) {
	if up > 0 {
		VPSLLW(Imm(uint64(up)), x, y)
	} else {
		VPSRLW(Imm(uint64(-up)), x, y)
	}
}

// shifted returns words of x, so many bits higher.
func (v isa) shifted(x reg.VecVirtual, up int) reg.VecVirtual {
	if up == 0 {
		return x
	}
	y := v.vec()
	v.shift(x, up, y)
	return y
}

// narrow reduces a vector's 128-bit parts to one by add, which is VADDPS or VMAXPS.
func (v isa) narrow(x reg.VecVirtual, add func(...Op)) reg.VecVirtual {
	y := x
	if v.lanes == 16 {
		half := YMM()
		VEXTRACTF64X4(Imm(1), x, half)
		y = YMM()
		add(half, x.AsY(), y)
	}
	high, out := XMM(), XMM()
	if v.lanes == 16 {
		VEXTRACTF32X4(Imm(1), y, high)
	} else {
		VEXTRACTF128(Imm(1), y, high)
	}
	add(high, y.AsX(), out)
	return out
}

// scalar reduces a vector to its lowest lane.
func (v isa) scalar(x reg.VecVirtual, add func(...Op)) reg.VecVirtual {
	out, t := v.narrow(x, add), XMM()
	VSHUFPS(Imm(0xee), out, out, t)
	add(t, out, out)
	VSHUFPS(Imm(0x55), out, out, t)
	add(t, out, out)
	return out
}

// constants that were emitted, by value.
var constants = map[string]Mem{}

// constant returns a memory operand that repeats x, for vectors of up to 16 lanes.
func (v isa) constant(x Constant) Mem {
	name := "c" + strings.NewReplacer("$", "", "(", "", ")", "", ".", "p", "-", "m", "+", "").Replace(x.Asm())
	if _, ok := constants[name]; !ok {
		constants[name] = GLOBL(name+v.suffix, RODATA|NOPTR)
		for i := range 16 {
			DATA(4*i, x)
		}
	}
	return constants[name]
}

// rowBlocks emits code for most rows at a time, then for what is left of
// them, and ends the function. body emits that for r rows and moves what it keeps to the next ones.
func rowBlocks(most int, rows reg.GPVirtual, body func(r int)) {
	rowBlocksUntil("rows0", most, rows, body)
	end()
}

// rowBlocksUntil is rowBlocks that goes on at a label.
func rowBlocksUntil(done string, most int, rows reg.GPVirtual, body func(r int)) {
	for r := most; r >= 1; r-- {
		label := fmt.Sprintf("rows%d", r)
		next := fmt.Sprintf("rows%d", r-1)
		if r == 1 {
			next = done
		}
		Label(label)
		CMPQ(rows, Imm(uint64(r)))
		JL(LabelRef(next))
		body(r)
		SUBQ(Imm(uint64(r)), rows)
		JMP(LabelRef(label))
	}
	Label(done)
}

// strided addresses the i-th of up to four things of size bytes, each step
// things after the one before; triple is 3 step.
func strided(base, step, triple reg.Register, size uint8, i int) Mem {
	switch i {
	case 0:
		return Mem{Base: base}
	case 3:
		return Mem{Base: base, Index: triple, Scale: size}
	}
	return Mem{Base: base, Index: step, Scale: size * uint8(i)}
}

// triple returns three times a register.
func triple(x reg.Register) reg.GPVirtual {
	r := GP64()
	LEAQ(Mem{Base: x, Index: x, Scale: 2}, r)
	return r
}
