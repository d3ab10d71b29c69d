#!/usr/bin/env bash
# Shows that the emulator notices: plants a bug in a copy of the kernels, runs the trace of a test again, and expects the named
# kind of build (build.sh) to say so. TinyLlama.Compute.Tests must be built. Ends with 1 if a bug was not noticed.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
kernels=$root/src/TinyLlama.Compute/Cuda/Kernels
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

# The thread sanitizer may need addresses that are not drawn by lot.
fixed=$(setarch -R true 2>/dev/null && echo setarch -R)

# plant NAME KIND SAYS TEST 'SOURCES' FILE BUG CODE: in FILE the text CODE becomes BUG; SOURCES are what the test launches.
plant() {
  local name=$1 kind=$2 says=$3 test=$4 sources=$5 file=$6 bug=$7 code=$8
  local trace=$work/$test copy=$work/kernels log=$work/log text
  if [ ! -f "$trace" ]; then
    TINYLLAMA_CUDA_TRACE=$trace dotnet "$root/artifacts/bin/TinyLlama.Compute.Tests/release/TinyLlama.Compute.Tests.dll" \
      -method "TinyLlama.Compute.Tests.Cuda.$test" >"$log" 2>&1 || { cat "$log"; failed=1; return; }
  fi

  rm -rf "$copy" && mkdir "$copy" && cp "$kernels"/*.cuh "$copy"
  for source in $sources; do cp "$kernels/$source.cu" "$copy"; done
  text=$(<"$copy/$file")
  if [[ $text != *"$code"* ]]; then
    echo "$name: $file has no such code any more: $code"
    failed=1
    return
  fi

  printf '%s\n' "${text/"$code"/"$bug"}" >"$copy/$file"
  if ! CUDA_EMULATOR_KERNELS=$copy CUDA_EMULATOR_OUT=$work "$here/build.sh" "$kind" >"$log" 2>&1; then
    cat "$log"
    failed=1
  elif $fixed "$work/$kind/replay" "$trace" >"$log" 2>&1; then
    echo "$name: NOT NOTICED by $kind"
    failed=1
  elif ! grep -qE "$says" "$log"; then
    echo "$name: noticed by $kind, but not as '$says':"
    head -20 "$log"
    failed=1
  else
    echo "$name: noticed by $kind: $(grep -m1 -E "$says" "$log")"
  fi
}

plant 'a barrier is missing' thread 'data race' RmsNormTests.Gradients_equal_the_cpu 'RmsNorm' Device.cuh \
  '' '    __syncthreads();  // the sums of the call before have been read'
plant 'two blocks write one row' thread 'data race' RmsNormTests.Gradients_equal_the_cpu 'RmsNorm' RmsNorm.cu \
  'partials + c' 'partials + (i64)blockIdx.x * channels + c'
plant 'a shuffle of part of a warp' plain 'a collective|deadlock' RmsNormTests.Gradients_equal_the_cpu 'RmsNorm' Device.cuh \
  'lane < count ? warp_sum(warps[lane]) : 0.0f' 'warp_sum(lane < count ? warps[lane] : 0.0f)'
plant 'one element too many' address 'heap-buffer-overflow' AdamWTests.Equals_the_cpu 'AdamW' AdamW.cu 'i <= count' 'i < count'
plant 'the halves of a fragment are swapped' plain 'other bytes' AttentionTests.Equals_the_cpu 'Attention AttentionBackward' Attention.cuh \
  'left[r], right[1], right[0]' 'left[r], right[0], right[1]'
plant 'a wait for cp.async is missing' plain 'other bytes' AttentionTests.Equals_the_cpu 'Attention AttentionBackward' Attention.cu \
  'source.end' $'cp_async_wait<0>();\n        source.end'
plant 'an addition is not atomic' thread 'data race' AttentionAtomicsTests.What_the_scratch_held_before_does_not_matter \
  'Attention AttentionBackward Copy' AttentionBackward.cu \
  '[](float* p, float x, float y) { p[0] += x; p[1] += y; }(to + j * 8' 'atomic_add(to + j * 8'
plant 'gradients of scores are read too early' thread 'data race' AttentionAtomicsTests.What_the_scratch_held_before_does_not_matter \
  'Attention AttentionBackward Copy' AttentionBackward.cu 'add_query_gradient<D, Rows>(d_query' \
  $'__syncthreads();\n            add_query_gradient<D, Rows>(d_query'
exit $failed
