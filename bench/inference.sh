#!/usr/bin/env bash
# Runs the same GGUF files in llama.cpp and here, in turns, and prints tokens/s (median of the rounds), their ratio, and
# the most memory that a round took. What bench/peers/llama.sh needs, this needs; the machine should be idle.
#
#   bench/inference.sh MODEL.gguf …     ROUNDS=3, THREADS (all), LLAMA_FOLDER as there, and TESTS are the defaults
#
# BUSY=N lets N endless loops run beside both.
#
# A test is "decode SEQUENCES DEPTH TOKENS", "prefill TOKENS" or "load".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
rounds=${ROUNDS:-3}
threads=${THREADS:-$(nproc)}
export LLAMA_FOLDER=${LLAMA_FOLDER:-artifacts/llama.cpp}
default_tests='load
prefill 512
decode 1 0 128
decode 1 1024 64
decode 16 32 32
decode 32 32 32'

bench/peers/llama.sh
dotnet build src/TinyLlama.Cli -c Release -v q -nologo >/dev/null

peer() {
  local kind=$1 model=$2
  shift 2
  case $kind in
    load) "$LLAMA_FOLDER/bench" load "$model" "$threads" ;;
    *) "$LLAMA_FOLDER/bench" "$kind" "$model" "$threads" 1 "$@" ;;
  esac
}

ours() {
  local kind=$1 model=$2
  shift 2
  local options
  case $kind in
    load) kind=decode options=(--tokens 1) ;;
    prefill) options=(--tokens "$1") ;;
    decode) options=(--sequences "$1" --depth "$2" --tokens "$3") ;;
  esac
  artifacts/bin/TinyLlama.Cli/release/TinyLlama.Cli bench "$kind" "$model" "${options[@]}" \
    --seconds 0 --threads "$threads" --json 2>/dev/null
}

# number KEY JSON: the first of that name.
number() { grep -oE "\"$1\": [0-9.]+" <<<"$2" | head -n 1 | cut -d' ' -f2; }

# result KIND JSON: tokens/s, or seconds to the first token.
result() {
  if [ "$1" = load ]; then
    awk "BEGIN { print $(number first_token_seconds "$2") + $(number load_seconds "$2" || echo 0) }"
  else
    number median_tokens_per_second "$2"
  fi
}

median() { sort -g | awk '{ a[NR] = $1 } END { print NR % 2 ? a[(NR + 1) / 2] : (a[NR / 2] + a[NR / 2 + 1]) / 2 }'; }

largest() { sort -g | tail -n 1; }

loops=()
for ((i = 0; i < ${BUSY:-0}; i++)); do
  while :; do :; done &
  loops+=($!)
done
trap 'kill "${loops[@]}" 2>/dev/null || true' EXIT

printf '%s, %s threads, load %s\n\n' "$(date -u +%FT%RZ)" "$threads" "$(cut -d' ' -f1 /proc/loadavg)"
printf '%-28s %-18s %10s %10s %7s %9s %9s\n' model test llama.cpp ours ratio 'MiB' 'MiB'
for model in "$@"; do
  cat "$model" >/dev/null
  while read -r kind arguments; do
    theirs='' own='' their_peak='' own_peak=''
    for ((round = 0; round < rounds; round++)); do
      # shellcheck disable=SC2086
      json=$(peer "$kind" "$model" $arguments)
      theirs+=$(result "$kind" "$json")$'\n' their_peak+=$(number peak_bytes "$json")$'\n'
      # shellcheck disable=SC2086
      json=$(ours "$kind" "$model" $arguments)
      own+=$(result "$kind" "$json")$'\n' own_peak+=$(number peak_bytes "$json")$'\n'
    done
    a=$(grep . <<<"$theirs" | median) b=$(grep . <<<"$own" | median)
    printf '%-28s %-18s %10.2f %10.2f %7.2f %9.0f %9.0f\n' "$(basename "$model")" "$kind $arguments" "$a" "$b" \
      "$(awk "BEGIN { print $b / $a }")" "$(($(grep . <<<"$their_peak" | largest) >> 20))" "$(($(grep . <<<"$own_peak" | largest) >> 20))"
  done <<<"${TESTS:-$default_tests}"
done
