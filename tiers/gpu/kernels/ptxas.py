#!/usr/bin/env python3
"""Assembles the kernels as a driver would, for several processors, and says what they take of each.

    ptxas.py PTXAS

A table of kernels and processors: registers of a thread, bytes that did not fit them (stored, loaded), bytes of
static shared memory of a block, instructions. Exit 1 if ptxas refuses a kernel or registers spill to memory.
"""
import pathlib
import re
import struct
import subprocess
import sys
import tempfile

PROCESSORS = "sm_80", "sm_90", "sm_100"
INSTRUCTION = 16  # bytes


def assemble(ptxas, ptx, processor, cubin):
    """Returns kernel: (registers, stored, loaded, shared) of a module."""
    done = subprocess.run([ptxas, "-v", "-arch", processor, "-o", cubin, ptx], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{ptx.name}, {processor}: {done.stdout}{done.stderr}")
    kernels = {}
    for part in re.split(r"Compiling entry function ", done.stderr)[1:]:
        name = re.match(r"'(\w+)'", part)[1]
        number = lambda pattern: int((re.search(pattern, part) or [0, 0])[1])
        kernels[name] = (number(r"Used (\d+) registers"), number(r"(\d+) bytes spill stores"),
                         number(r"(\d+) bytes spill loads"), number(r"(\d+) bytes smem"))
    return kernels


def code(cubin):
    """Returns kernel: bytes of code, from the sections of an ELF file."""
    b = cubin.read_bytes()
    at, = struct.unpack_from("<Q", b, 40)
    size, count, names = struct.unpack_from("<HHH", b, 58)
    sections = [struct.unpack_from("<IIQQQQ", b, at + i * size) for i in range(count)]
    name_of = lambda s: b[sections[names][4] + s[0]:].split(b"\0", 1)[0].decode()
    return {name_of(s)[len(".text."):]: s[5] for s in sections if name_of(s).startswith(".text.")}


def main(ptxas):
    print(f"| {'kernel':<16} | {'processor':<9} | registers | spilled | shared | instructions |")
    print("|---|---|---|---|---|---|")
    worst = 0
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder, "cubin")
        order = lambda p: (p.stem.split("_d")[0], int(p.stem.split("_d")[1]))
        for ptx in sorted(pathlib.Path(__file__).parent.glob("*_d*.ptx"), key=order):
            for processor in PROCESSORS:
                kernels = assemble(ptxas, ptx, processor, cubin)
                sizes = code(cubin)
                for name, (registers, stored, loaded, shared) in sorted(kernels.items()):
                    label = f"{name}, {ptx.stem.split('_d')[1]}"
                    print(f"| {label:<16} | {processor:<9} | {registers:>9} | {f'{stored}, {loaded}':>7} | {shared:>6} | {sizes[name] // INSTRUCTION:>12} |")
                    worst = max(worst, stored, loaded)
    if worst:
        sys.exit(f"up to {worst} bytes of a thread's registers spill")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
