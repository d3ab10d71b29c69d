#!/usr/bin/env bash
# Trains the same shapes in PyTorch and here, in turns, and prints tokens/s, the processor time of a step, peak
# memory and the ratios of ours to PyTorch's. Debian or Ubuntu; installs PyTorch if it is missing, which needs root.
#
#   bench/peers/train.sh [S|M …]     ROUNDS=3, RUN_SECONDS=15, PRECISION=fp32 (or bf16) and RECOMPUTE=none
#                                    (or elementwise: less memory of ours for a little time) are the defaults
#
# PyTorch gets its best settings: the OpenMP build of OpenBLAS, which shares threads with PyTorch instead of fighting
# with them, the kernels of this processor (not those that an environment may name), and a malloc that keeps its pages.
# Where other programs run, set OMP_WAIT_POLICY=passive, or its threads spin for each other, and look at processor time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
rounds=${ROUNDS:-3}
seconds=${RUN_SECONDS:-15}
precision=${PRECISION:-fp32}
recompute=${RECOMPUTE:-none}
threads=$(nproc)

packages=(python3-torch libopenblas0-openmp)
dpkg -s "${packages[@]}" >/dev/null 2>&1 || apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
dotnet build src/TinyLlama.Cli -c Release -v q -nologo >/dev/null

peer() {
  env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE OMP_NUM_THREADS="$threads" \
    LD_LIBRARY_PATH="/usr/lib/$(uname -m)-linux-gnu/openblas-openmp" \
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=34359738368 MALLOC_TOP_PAD_=67108864 \
    /usr/bin/python3 bench/peers/pytorch/train.py --model "$1" --precision "$precision" \
    --seconds "$seconds" --threads "$threads"
}

ours() {
  dotnet artifacts/bin/TinyLlama.Cli/release/TinyLlama.Cli.dll bench train \
    --model "$1" --precision "$precision" --recompute "$recompute" --seconds "$seconds" --threads "$threads" --json 2>/dev/null
}

# number KEY JSON
number() { grep -oE "\"$1\": [0-9.]+" <<<"$2" | cut -d' ' -f2; }

# row NAME JSON
row() {
  printf '%-8s %9.0f %9.0f %13.0f %9.0f\n' "$1" "$(number best_tokens_per_second "$2")" \
    "$(number median_tokens_per_second "$2")" "$(awk "BEGIN { print 1e3 * $(number processor_seconds "$2") }")" \
    "$(($(number peak_bytes "$2") >> 20))"
}

# ratio KEY
ratio() { awk "BEGIN { print $(number "$1" "$own") / $(number "$1" "$other") }"; }

for model in "${@:-S}"; do
  for ((round = 1; round <= rounds; round++)); do
    printf '\n%s, %s, recompute %s, %s threads, load %s\n' "$model" "$precision" "$recompute" "$threads" "$(cut -d' ' -f1 /proc/loadavg)"
    printf '%-8s %9s %9s %13s %9s\n' tokens/s best median 'processor ms' 'peak MiB'
    other=$(peer "$model")
    row PyTorch "$other"
    own=$(ours "$model")
    row ours "$own"
    printf '%-8s %9.2f %9.2f %13.2f %9.2f\n' ratio "$(ratio best_tokens_per_second)" \
      "$(ratio median_tokens_per_second)" "$(ratio processor_seconds)" "$(ratio peak_bytes)"
  done
done
