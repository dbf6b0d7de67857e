#!/bin/sh
# Compiles the kernels to PTX, a module for each head dimension: D, and for how many blocks of 128 threads a multiprocessor
# is to have registers (docs/gpu.md). clang has no need of CUDA's toolkit for it.
set -eu
cd "$(dirname "$0")"
CLANG=${CLANG:-clang++-19}
for shape in 64:4:4 128:3:3 256:2:2; do
  IFS=: read -r d blocks low <<END
$shape
END
  "$CLANG" -x cuda --cuda-device-only --cuda-gpu-arch=sm_80 -nocudainc -nocudalib -std=c++17 -O3 -Wall -Wno-pass-failed \
    -Dsize_t='unsigned long' -DHEAD_DIM="$d" -DBLOCKS="$blocks" -DBLOCKS_LOW="$low" -S -o "attend_d$d.ptx" attend.cu
done
