#!/usr/bin/env bash
# Runs the tests of CUDA operations with a trace of each class, then every trace again: with another order of blocks and threads
# (plain), with the address and undefined-behaviour sanitizers (address), and with the thread sanitizer (thread), to which a CUDA
# thread is a thread. check.sh [CLASS…]; TinyLlama.Compute.Tests must be built. A line for each run; ends with 1 if any failed.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
tests=$root/tests/TinyLlama.Compute.Tests/Cuda
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for kind in plain address thread; do
  "$here/build.sh" $kind >/dev/null || exit 1
done

if [ $# = 0 ]; then
  mapfile -t classes < <(grep -lE '^public sealed .*: (CudaTests|AttentionProblems)' "$tests"/*.cs | xargs -n1 basename | sed 's/\.cs$//')
  set -- "${classes[@]}"
fi

# replay CLASS MODE [OPTION…]: one line, and what was said where it failed.
replay() {
  local class=$1 mode=$2 log=$work/$1.$2.log seconds=$SECONDS
  shift 2
  $fixed "$root/artifacts/cuda-emulator/$mode/replay" "$@" "$work/$class" >"$log" 2>&1
  local code=$?
  printf '%-24s %-8s %s, %d s\n' "$class" "$mode" "$([ $code = 0 ] && tail -1 "$log" || echo "FAILED with $code")" $((SECONDS - seconds))
  [ $code = 0 ] || { head -60 "$log"; return 1; }
}

check() {
  local class=$1 failed=0 bytes=()
  [ "$class" != AttentionAtomicsTests ] || bytes=(--any-bytes)
  TINYLLAMA_CUDA_TRACE=$work/$class dotnet "$root/artifacts/bin/TinyLlama.Compute.Tests/release/TinyLlama.Compute.Tests.dll" \
    -class "TinyLlama.Compute.Tests.Cuda.$class" >"$work/$class.log" 2>&1 || { cat "$work/$class.log"; return 1; }
  replay "$class" plain --schedule 2 "${bytes[@]}" || failed=1
  replay "$class" address "${bytes[@]}" || failed=1
  replay "$class" thread "${bytes[@]}" || failed=1
  rm -f "$work/$class"
  return $failed
}

# The thread sanitizer may need addresses that are not drawn by lot.
fixed=$(setarch -R true 2>/dev/null && echo setarch -R)
export here root work fixed
export -f replay check
printf '%s\n' "$@" | xargs -P "$(nproc)" -I{} bash -c 'check "$1"' - {}
