#!/usr/bin/env bash
# Builds the emulator with all kernels: build.sh [plain|address|thread]; prints the folder with libcuda-emulator.so and
# replay. Compiles what is older than its source or any header. Several may call it at once.
set -euo pipefail
kind=${1:-plain}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
kernels=${CUDA_EMULATOR_KERNELS:-$root/src/TinyLlama.Compute/Cuda/Kernels}
out=${CUDA_EMULATOR_OUT:-$root/artifacts/cuda-emulator}/$kind
mkdir -p "$out"
exec 9>"$out/lock"
flock 9

flags=(-std=c++17 -fPIC -pthread -fvisibility=default -ffp-contract=off -Wall -Wextra -Werror -Wno-unused-function
  -Wno-unknown-pragmas -I"$here" -I"$kernels")
case $kind in
  plain) flags+=(-O2) ;;
  address) flags+=(-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined) ;;
  thread) flags+=(-O1 -g -DEMULATOR_TSAN) ;;
  *) echo "build.sh: plain, address or thread, not '$kind'" >&2; exit 2 ;;
esac

# The table of a source's kernels beside its text.
for source in "$kernels"/*.cu; do
  name=$(basename "$source")
  {
    printf '#include "emulator.h"\n\nnamespace {\n#include "%s"\n}\n\n' "$source"
    printf 'asm(".section .rodata\\n.local text\\n.local text_end\\ntext: .incbin \\"%s\\"\\ntext_end:\\n.text\\n");\n' "$source"
    printf 'extern "C" __attribute__((visibility("hidden"))) const char text[], text_end[];\n'
    printf 'static emulator::Source source("%s", text, text_end - text, {\n' "$name"
    sed -nE 's/^KERNEL\(([^,)]*)[^)]*\) void ([a-z0-9_]+)\(.*/    emulator::function<\2>("\2", \1),/p' "$source"
    printf '});\n'
  } >"$out/$name.cpp.new"
  cmp -s "$out/$name.cpp.new" "$out/$name.cpp" && rm "$out/$name.cpp.new" || mv "$out/$name.cpp.new" "$out/$name.cpp"
done

objects=()
compile=()
for source in "$here"/*.cpp "$out"/*.cu.cpp; do
  name=$(basename "$source" .cpp)
  kernel=$kernels/$name
  [ "$name" = "${name%.cu}" ] || [ -f "$kernel" ] || { rm "$source"; continue; }
  object=$out/$name.o
  objects+=("$object")
  if [ -f "$kernel" ]; then needs=("$kernel" "$here/emulator.h" "$kernels"/*.cuh); else needs=("$here"/*.h); fi
  newest=$(ls -t "$source" "$here/build.sh" "${needs[@]}" | head -1)
  [ "$object" -nt "$newest" ] || compile+=("$name")
done

compile_one() {
  local name=$1 source=$here/$1.cpp
  [ -f "$source" ] || source=$out/$name.cpp
  local instrument=()
  # What runs as a CUDA thread; the rest tells the sanitizer itself what is ordered.
  if [ "$kind" = thread ] && { [ "$name" = memory ] || [ "$name" != "${name%.cu}" ]; }; then instrument=(-fsanitize=thread); fi
  g++ "${flags[@]}" "${instrument[@]}" -c "$source" -o "$out/$name.o"
}

failed=0
running=()
for name in "${compile[@]}"; do
  compile_one "$name" &
  running+=($!)
  if [ ${#running[@]} -ge "$(nproc)" ]; then
    wait "${running[0]}" || failed=1
    running=("${running[@]:1}")
  fi
done
for job in "${running[@]}"; do wait "$job" || failed=1; done
[ "$failed" = 0 ]

link=()
[ "$kind" != address ] || link=(-fsanitize=address,undefined)
[ "$kind" != thread ] || link=(-fsanitize=thread)
if [ ${#compile[@]} -gt 0 ] || [ ! -f "$out/libcuda-emulator.so" ]; then
  library=()
  for object in "${objects[@]}"; do [ "$object" = "$out/replay.o" ] || library+=("$object"); done
  rm -rf "$out/cache"
  g++ -shared -pthread "${link[@]}" "${library[@]}" -o "$out/libcuda-emulator.so.new"
  mv "$out/libcuda-emulator.so.new" "$out/libcuda-emulator.so"
  g++ -pthread "${link[@]}" "${objects[@]}" -o "$out/replay.new"
  mv "$out/replay.new" "$out/replay"
fi
echo "$out"
