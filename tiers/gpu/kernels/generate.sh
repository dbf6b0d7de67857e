#!/bin/sh
# Compiles the kernels to PTX, a module for each head dimension: D, and for how many blocks of 128 threads a multiprocessor
# is to have registers (docs/gpu.md): of attend and gather, of those for all bits, and of scan; and those of tests. clang has no need of CUDA's toolkit for it.
set -eu
cd "$(dirname "$0")"
CLANG=${CLANG:-clang++-19} # others write other PTX
command -v "$CLANG" >/dev/null || {
  echo "$0: $CLANG is needed: install the package clang-19, or say which with CLANG=" >&2
  exit 2
}
compile() {
  "$CLANG" -x cuda --cuda-device-only --cuda-gpu-arch=sm_80 -nocudainc -nocudalib -std=c++17 -O3 -Wall -Wno-pass-failed \
    -Wno-unneeded-internal-declaration -Wno-cuda-compat -Dsize_t='unsigned long' -S "$@"
}
mkdir -p testdata
for shape in 64:4:4:6 128:3:2:5 256:2:2:3; do
  IFS=: read -r d blocks low scan <<END
$shape
END
  compile -DHEAD_DIM="$d" -DBLOCKS="$blocks" -DBLOCKS_LOW="$low" -o "attend_d$d.ptx" attend.cu
  compile -DHEAD_DIM="$d" -DBLOCKS="$blocks" -DBLOCKS_LOW="$low" -o "gather_d$d.ptx" gather.cu
  compile -DHEAD_DIM="$d" -DSCAN_BLOCKS="$scan" -o "select_d$d.ptx" select.cu
  compile -DHEAD_DIM="$d" -o "testdata/probe_d$d.ptx" probe.cu
  compile -ffp-contract=off -DHEAD_DIM="$d" -o "seal_d$d.ptx" seal.cu # rounds as the host does
done
