#!/usr/bin/env bash
# Everything that only a machine with an NVIDIA GPU can tell, in one run of less than ten minutes that needs nothing but what FILE
# carries: no SDK, no network. Not proved: nobody has run it on a GPU yet; without one it was run on the tests' emulator.
#
#   bench/gpu.sh pack [FILE]   with the .NET SDK: publishes the last commit with its tests, self-contained for Linux on
#                              x86-64, and the golden files under TINYLLAMA_SHARED, to FILE (artifacts/gpu.tar.xz)
#   bench/gpu.sh [FILE]        with the GPU: unpacks FILE and prints, what is worth most first,
#     1. the machine and the libraries that were found
#     2. registers, shared and local bytes of each kernel, as NVRTC compiled it
#     3. the tests of CUDA, class by class: each operation beside the CPU's, declarations beside the toolkit's headers; then the
#        tiny Llama beside its golden logits, gradients and optimizer steps
#     4. training of tinyllama-1.1b at context 2048, 16,384 tokens a step with AdamW in each: ours, ours with atomics, then
#        PyTorch (bench/peers/pytorch/train_gpu.py; skipped where python3 has no torch), ours again
#     5. each operation by itself
#
# SECONDS_LEFT=570 is how long all of it may take: each stage has a limit of its own and loses only itself, and what is left of the
# time goes to the next. RUN_SECONDS=10 is how long each training is measured, SEQUENCES=8 how many of 2,048 tokens a step has (8
# take 40 GiB), RESULTS=artifacts/gpu where all output goes, as it comes: in 8 files. The exit code is 1 where a test or a training
# failed. Where CUDA's libraries are Python wheels, python3 must be the one of their environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
seconds=${RUN_SECONDS:-10}
sequences=${SEQUENCES:-8}
end=$((SECONDS + ${SECONDS_LEFT:-570}))

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
  # The classes of tests: the table of kernels, the text of the sources, and what is left in the order of names.
  (cd "$source/tests/TinyLlama.Compute.Tests/Cuda" && ls ./*Tests.cs) | sed -E 's/.*\/(.*)\.cs/\1/; /^(CudaTests|Kernel(Source)?Tests)$/d' >"$source/gpu/classes"
  mkdir -p "$source/gpu/shared/goldens"
  [ ! -d "$shared/goldens/llama-tiny" ] || cp -r "$shared/goldens/llama-tiny" "$source/gpu/shared/goldens/"
  XZ_OPT="-3 -T0" tar -C "$source/gpu" -cJf "$archive" .
  ls -l "$archive"
}

# unpack ARCHIVE FOLDER: by tar, or by Python where there is no xz.
unpack() {
  tar -xJf "$1" -C "$2" 2>/dev/null || python3 -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2])' "$1" "$2"
}

heading() { printf '\n== %s (%s, %d s left)\n' "$1" "$(date -u +%FT%RZ)" $((end - SECONDS)); }

# limited SECONDS COMMAND…: stops it after so long, or when the time for all is over.
limited() {
  local limit=$1 left=$((end - SECONDS))
  shift
  [ "$left" -gt 0 ] || { echo 'no time is left' >&2; return 124; }
  timeout -k 10 $((limit < left ? limit : left)) "$@" </dev/null
}

# tests NAME SECONDS PROGRAM FILTER…: tests on the GPU; all of their output goes to a file, the count and the first failures to the
# screen.
tests() {
  local name=$1 limit=$2 program=$3 code=0 stopped='' output=$work/output.txt
  shift 3
  limited "$limit" "$work/bin/$program" "$@" -maxThreads 1 -showLiveOutput -noColor 2>&1 | tee "$output" >>"$results/tests.txt" || code=$?
  [ $code = 0 ] || failed=1
  [ $code -lt 124 ] || stopped='STOPPED, out of time: '
  sed -nE 's/.*KernelTests\..*\[OUTPUT\] //p' "$output"
  printf '%-24s %s\n' "$name" "$stopped$(tail -n 1 "$output")"
  grep -m 3 -A 8 -E '\[FAIL\]' "$output" || true
  grep -A 1 -E '\[SKIP\]' "$output" || true
}

# number KEY FILE
number() { grep -oE "\"$1\": [0-9.]+" "$2" | head -n 1 | cut -d' ' -f2; }

# row NAME FILE
row() {
  printf '%-16s %9.0f %9.0f %9.0f\n' "$1" "$(number best_tokens_per_second "$2")" "$(number median_tokens_per_second "$2")" \
    "$(($(number peak_bytes "$2") >> 20))"
}

# train NAME FILE SECONDS COMMAND…: a row of what it measured, or the end of what it said.
train() {
  local name=$1 file=$results/$2.json limit=$3
  shift 3
  limited "$limit" "$@" >"$file" 2>>"$results/errors.txt" || { printf '%-16s failed: ' "$name"; tail -n 3 "$results/errors.txt"; failed=1; return 0; }
  row "$name" "$file"
}

# ours NAME FILE OPTION…
ours() {
  local name=$1 file=$2
  shift 2
  train "$name" "$file" 90 "$work/bin/TinyLlama.Cli" bench train --model tinyllama-1.1b --sequences "$sequences" --ctx 2048 --device cuda \
    --seconds "$seconds" --json "$@"
}

run() {
  local archive=${1:-artifacts/gpu.tar.xz} class
  failed=0
  work=$(mktemp -d)
  # shellcheck disable=SC2064
  trap "rm -rf '$work'" EXIT
  unpack "$archive" "$work"
  export TINYLLAMA_TEST_DEVICE=cuda TINYLLAMA_SHARED=$work/shared XDG_CACHE_HOME=$work/cache
  VIRTUAL_ENV=${VIRTUAL_ENV:-$(python3 -c 'import sys; print(sys.prefix)' 2>/dev/null || true)}
  export VIRTUAL_ENV

  heading machine
  limited 20 nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm --format=csv,noheader || true
  limited 60 "$work/bin/TinyLlama.Cli" env || true

  heading 'kernels, compiled'
  printf '%-36s %9s %7s %6s\n' kernel registers shared local
  tests KernelTests 120 TinyLlama.Compute.Tests -class TinyLlama.Compute.Tests.Cuda.KernelTests

  # Tests leave half of the time.
  local all=$end
  end=$((end - (end - SECONDS) / 2))
  heading operations
  while read -r class; do
    tests "$class" 60 TinyLlama.Compute.Tests -class "TinyLlama.Compute.Tests.Cuda.$class"
  done <"$work/classes"

  heading 'models'
  tests goldens 60 TinyLlama.Tests -method '*n_a_GPU*'
  tests CudaModelTests 60 TinyLlama.Tests -method '*.CudaModelTests.*'
  end=$all

  heading "training of tinyllama-1.1b, $sequences x 2048 tokens a step"
  printf '%-16s %9s %9s %9s\n' tokens/s best median 'peak MiB'
  ours ours ours
  ours 'ours, atomics' ours-atomics --atomics
  if limited 60 python3 -c 'import torch' 2>/dev/null; then
    train PyTorch pytorch 150 python3 bench/peers/pytorch/train_gpu.py --sequences "$sequences" --seconds "$seconds"
    ours 'ours, again' ours-again
  else
    echo 'python3 has no torch: no peer'
  fi
  [ ! -s "$results/ours.json" ] || awk -v rate="$(number median_tokens_per_second "$results/ours.json")" \
    -v flops="$(number flops "$results/ours.json")" -v tokens="$((sequences * 2048))" \
    -v ceiling="$(number all_threads_gflops "$results/ours.json")" -v bytes="$(number all_threads_read_gigabytes_per_second "$results/ours.json")" \
    'BEGIN { t = rate * flops / tokens * 1e-12; printf "ours: %.0f TFLOP/s, %.0f %% of the %.0f of a large product; a copy moves %.0f GB/s\n", t, 1e5 * t / ceiling, ceiling * 1e-3, bytes }'

  heading 'operations, one by one'
  for class in kernels matmul; do
    limited 60 "$work/bin/TinyLlama.Cli" bench "$class" --model tinyllama-1.1b --sequences "$sequences" --ctx 2048 --device cuda --seconds 0.1 \
      2>>"$results/errors.txt" | tee -a "$results/operations.txt" || { tail -n 3 "$results/errors.txt"; failed=1; }
  done
  printf '\nall output is in %s\n' "$results"
  return "$failed"
}

if [ "${1:-}" = pack ]; then
  pack "${@:2}"
else
  results=${RESULTS:-artifacts/gpu}
  mkdir -p "$results"
  results=$(realpath "$results")
  rm -f "$results"/{screen,tests,errors,operations}.txt "$results"/{ours,ours-atomics,ours-again,pytorch}.json
  run "$@" 2>&1 | tee "$results/screen.txt"
fi
