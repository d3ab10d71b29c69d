#!/usr/bin/env bash
# Everything that only a machine with an NVIDIA GPU can tell, in one run of a few minutes. Not proved: nobody has run it on
# a GPU yet; without one it was run on the tests' emulator.
#
#   bench/gpu.sh pack [FILE]   with the .NET SDK: publishes the last commit with its tests, self-contained for Linux on
#                              x86-64, and the golden files under TINYLLAMA_SHARED, to FILE (artifacts/gpu.tar.xz)
#   bench/gpu.sh [FILE]        with the GPU, and no SDK: unpacks FILE and prints, in this order,
#     1. the machine and the libraries that were found
#     2. the tests of CUDA on the GPU: declarations beside the toolkit's headers, NVRTC's registers and local bytes of each
#        kernel, each operation beside the CPU's, the tiny Llama beside its golden logits, gradients and optimizer steps
#     3. training of tinyllama-1.1b at context 2048, 16,384 tokens a step with AdamW in each, in turns with PyTorch:
#        PyTorch, ours, PyTorch (bench/peers/pytorch/train_gpu.py; skipped where python3 has no torch)
#
# RUN_SECONDS=20 is how long each training is measured, SEQUENCES=8 how many of 2,048 tokens a step has (8 take 40 GiB),
# RESULTS=artifacts/gpu where all output goes. The exit code is 1 where a test or a training failed. Where CUDA's libraries
# are Python wheels, python3 must be the one of their environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
seconds=${RUN_SECONDS:-20}
sequences=${SEQUENCES:-8}

pack() {
  local archive=${1:-artifacts/gpu.tar.xz} source shared=${TINYLLAMA_SHARED:-../shared}
  mkdir -p "$(dirname "$archive")"
  archive=$(realpath "$archive")
  shared=$(realpath "$shared")
  source=$(mktemp -d)
  # shellcheck disable=SC2064
  trap "rm -rf '$source'" EXIT
  # Of the last commit, whatever lies in the working tree.
  git archive HEAD | tar -x -C "$source"
  for project in tests/TinyLlama.Compute.Tests tests/TinyLlama.Tests src/TinyLlama.Cli; do
    dotnet publish "$source/$project" -c Release -r linux-x64 --self-contained -p:RunAnalyzers=false -v q -nologo -o "$source/gpu/bin"
  done
  rm -rf "$source"/gpu/bin/{Microsoft.CodeCoverage,*.xml,*.pdb}
  mkdir -p "$source/gpu/shared/goldens"
  [ ! -d "$shared/goldens/llama-tiny" ] || cp -r "$shared/goldens/llama-tiny" "$source/gpu/shared/goldens/"
  XZ_OPT="-3 -T0" tar -C "$source/gpu" -cJf "$archive" .
  ls -l "$archive"
}

heading() { printf '\n== %s (%s)\n' "$1" "$(date -u +%FT%RZ)"; }

# tests NAME PROGRAM FILTER…: the tests of a program on the GPU; all of their output goes to a file, its end to the screen.
tests() {
  local name=$1 program=$2
  shift 2
  heading "$name"
  timeout 300 "$work/bin/$program" "$@" -maxThreads 1 -showLiveOutput -noColor >"$results/$name.txt" 2>&1 || failed=1
  sed -nE 's/.*No_kernel_uses_local_memory \[OUTPUT\] //p' "$results/$name.txt"
  grep -A 8 -E '\[FAIL\]' "$results/$name.txt" || true
  grep -A 1 -E '\[SKIP\]' "$results/$name.txt" || true
  tail -n 1 "$results/$name.txt"
}

# number KEY FILE
number() { grep -oE "\"$1\": [0-9.]+" "$2" | head -n 1 | cut -d' ' -f2; }

# row NAME FILE
row() {
  printf '%-10s %9.0f %9.0f %9.0f\n' "$1" "$(number best_tokens_per_second "$2")" "$(number median_tokens_per_second "$2")" \
    "$(($(number peak_bytes "$2") >> 20))"
}

peer() {
  timeout 400 python3 bench/peers/pytorch/train_gpu.py --sequences "$sequences" --seconds "$seconds" >"$results/$1.json" 2>"$results/$1.log" || { tail -n 3 "$results/$1.log"; failed=1; return; }
  row PyTorch "$results/$1.json"
}

ours() {
  timeout 300 "$work/bin/TinyLlama.Cli" bench train --model tinyllama-1.1b --sequences "$sequences" --ctx 2048 --device cuda \
    --seconds "$seconds" --json >"$results/ours.json" 2>"$results/ours.log" || { tail -n 3 "$results/ours.log"; failed=1; return; }
  row ours "$results/ours.json"
}

run() {
  local archive=${1:-artifacts/gpu.tar.xz}
  results=${RESULTS:-artifacts/gpu}
  failed=0
  mkdir -p "$results"
  results=$(realpath "$results")
  work=$(mktemp -d)
  # shellcheck disable=SC2064
  trap "rm -rf '$work'" EXIT
  tar -xJf "$archive" -C "$work"
  export TINYLLAMA_TEST_DEVICE=cuda TINYLLAMA_SHARED=$work/shared XDG_CACHE_HOME=$work/cache
  VIRTUAL_ENV=${VIRTUAL_ENV:-$(python3 -c 'import sys; print(sys.prefix)' 2>/dev/null || true)}
  export VIRTUAL_ENV

  heading machine
  nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm --format=csv,noheader || true
  "$work/bin/TinyLlama.Cli" env | tee "$results/env.txt"

  tests operations TinyLlama.Compute.Tests -namespace TinyLlama.Compute.Tests.Cuda -class- '*KernelSourceTests'
  tests models TinyLlama.Tests -method '*.CudaModelTests.*' -method '*n_a_GPU*'

  heading "training of tinyllama-1.1b, $sequences x 2048 tokens a step"
  printf '%-10s %9s %9s %9s\n' tokens/s best median 'peak MiB'
  local torch=1
  python3 -c 'import torch' 2>/dev/null || { torch=0; echo 'python3 has no torch: no peer'; }
  [ $torch = 0 ] || peer pytorch-before
  ours
  [ $torch = 0 ] || peer pytorch-after
  [ ! -s "$results/ours.json" ] || awk -v rate="$(number median_tokens_per_second "$results/ours.json")" \
    -v flops="$(number flops "$results/ours.json")" -v tokens="$((sequences * 2048))" \
    -v ceiling="$(number all_threads_gflops "$results/ours.json")" -v bytes="$(number all_threads_read_gigabytes_per_second "$results/ours.json")" \
    'BEGIN { t = rate * flops / tokens * 1e-12; printf "ours: %.0f TFLOP/s, %.0f %% of the %.0f of a large product; a copy moves %.0f GB/s\n", t, 1e5 * t / ceiling, ceiling * 1e-3, bytes }'
  printf '\nall output is in %s\n' "$results"
  return "$failed"
}

if [ "${1:-}" = pack ]; then
  pack "${@:2}"
else
  run "$@"
fi
