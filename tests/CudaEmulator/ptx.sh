#!/usr/bin/env bash
# Compiles a kernel source to PTX by clang, without a CUDA toolkit: ptx.sh FILE.cu sm_80 FILE.ptx. A check that the source
# is one; the PTX inside asm strings nobody but a real NVRTC reads.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"${CLANG:-clang-19}" -x cuda --cuda-device-only --cuda-gpu-arch="$2" --cuda-feature=+ptx78 -nocudainc -nocudalib -nostdinc++ \
  -include "$here/clang.h" -I"$here/../../src/TinyLlama.Compute/Cuda/Kernels" -Wno-unknown-cuda-version -std=c++17 -O3 \
  -Wall -Wextra -Werror -Wno-unused-function -S "$1" -o "$3"
