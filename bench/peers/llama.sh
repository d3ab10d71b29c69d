#!/usr/bin/env bash
# Measures llama.cpp with the libraries that npm's node-llama-cpp carries: one line of JSON for each run. Linux on
# x86-64 with gcc, git and npm; the machine should be idle: "others" in a line is how many cores other programs used.
#
#   bench/peers/llama.sh MODEL.gguf …     THREADS (all), ROUNDS=3 and LLAMA_FOLDER=artifacts/llama.cpp are the defaults
#
# LLAMA_FOLDER keeps the libraries and the program; `$LLAMA_FOLDER/bench quantize F16.gguf THREADS q4_k_m OUT.gguf`
# writes models of other types.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
threads=${THREADS:-$(nproc)}
rounds=${ROUNDS:-3}
folder=${LLAMA_FOLDER:-artifacts/llama.cpp}
package=3.22.1

mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
modules=$folder/node_modules
libraries=$modules/@node-llama-cpp/linux-x64/bins/linux-x64

if [ ! -d "$libraries" ]; then
  NODE_LLAMA_CPP_SKIP_DOWNLOAD=true npm install --silent --no-audit --no-fund --ignore-scripts --omit=optional \
    --prefix "$folder" "node-llama-cpp@$package" "@node-llama-cpp/linux-x64@$package" >&2
fi

# The package has the sources of its libraries, and so the headers that they were built with.
if [ ! -d "$folder/headers" ]; then
  git clone --quiet --bare "$modules/node-llama-cpp/llama/gitRelease.bundle" "$folder/sources"
  mkdir "$folder/headers"
  git -C "$folder/sources" archive HEAD include ggml/include | tar -x -C "$folder/headers"
fi

gcc -std=gnu11 -O2 -Wall -Wextra -DLIBRARIES="\"$libraries\"" \
  -I"$folder/headers/include" -I"$folder/headers/ggml/include" bench/peers/llama.cpp/bench.c -o "$folder/bench" \
  "$libraries"/libllama.v*.so "$libraries"/libggml.v*.so "$libraries"/libggml-base.so -Wl,-rpath,"$libraries"

run() { "$folder/bench" "$1" "$model" "$threads" "${@:2}"; }

for model in "$@"; do
  cat "$model" >/dev/null
  for ((round = 0; round < rounds; round++)); do
    run load
  done
  run prefill "$rounds" 512
  run decode "$rounds" 1 0 128
  run decode "$rounds" 1 1536 128
  for sequences in 1 4 8 16 32; do
    run decode "$rounds" "$sequences" 32 32
  done
done
