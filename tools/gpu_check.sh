#!/usr/bin/env bash
# What only a GPU can show, in one command and without a network:
#
#   tools/gpu_check.sh              everything
#   tools/gpu_check.sh test         the tests of the cuda backend
#   tools/gpu_check.sh sanitize     compute-sanitizer's four tools over small calls of every route
#   tools/gpu_check.sh bench        the benchmarks, into benchmarks/results/
#
# Each builds the extension in place first, for this GPU alone. Needs, already there: PYTHON (python3) with torch for
# CUDA, numpy, transformers, safetensors, setuptools, pybind11, ninja, pytest, and for bench pytest-benchmark and
# matplotlib; nvcc and compute-sanitizer on PATH or in CUDA_HOME. RESULTS is another folder for the benchmarks' report,
# SECONDS_EACH a part's limit. No setting of the GPU is touched.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-benchmarks/results}
SECONDS_EACH=${SECONDS_EACH:-470} # a part's limit, its build included
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
failed=()

# note NAME STATUS: what became of a step, in words.
note() {
  case $2 in
    0) printf '%s: passed (at %d s)\n' "$1" "$SECONDS" ;;
    124 | 137) printf 'FAILED: %s ran out of time (at %d s)\n' "$1" "$SECONDS"; failed+=("$1") ;;
    *) printf 'FAILED: %s, exit status %d (at %d s)\n' "$1" "$2" "$SECONDS"; failed+=("$1") ;;
  esac
}

# limited COMMAND...: within what is left of the current part.
limited() {
  local left=$((deadline - SECONDS))
  [ "$left" -gt 0 ] || return 124
  timeout --kill-after=5 "$left" "$@"
}

build() {
  "$PYTHON" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "no CUDA device")' || return
  CUDA_HOME=$("$PYTHON" tools/cuda_home.py) || return
  export CUDA_HOME PATH=$CUDA_HOME/bin:$PATH
  # For the GPU at hand: setup.py asks torch for it where no list is given.
  limited env -u TORCH_CUDA_ARCH_LIST ROUTED_PEFT_CUDA=1 MAX_JOBS="${MAX_JOBS:-$(nproc)}" \
    "$PYTHON" setup.py -q build_ext --inplace || return
  "$PYTHON" -c 'import routed_peft; info = routed_peft.build_info(); print(info); assert info["cuda"]'
}

run_test() {
  local workers=()
  if "$PYTHON" -c 'import xdist' 2>/dev/null; then workers=(-n 4); fi
  # A missing device is a failure here, not a skip.
  ROUTED_PEFT_REQUIRE_CUDA=1 limited "$PYTHON" -m pytest -q -rs --maxfail=30 --tb=short "${workers[@]}" -m cuda tests
  note "tests of the cuda backend" $?
}

run_sanitize() {
  command -v compute-sanitizer >/dev/null || { note "compute-sanitizer, which is not on PATH" 127; return; }
  local end=$deadline tools=4
  for tool in memcheck racecheck initcheck synccheck; do
    deadline=$((SECONDS + (end - SECONDS) / tools--)) # an even share of what is left
    printf '\n--- %s\n' "$tool"
    # Our kernels alone; and every tensor its own allocation, so that the end of one is the end of what may be read.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited compute-sanitizer --tool "$tool" --error-exitcode 9 \
      --report-api-errors no --kernel-name kernel_substring=routed_peft --print-limit 20 \
      "$PYTHON" tests/gpu/sanitize_cases.py
    note "$tool" $?
  done
}

run_bench() {
  local written=build/gpu_bench.json left=$((deadline - SECONDS))
  [ "$left" -gt 0 ] || { note "benchmarks" 124; return; }
  mkdir -p build && rm -f "$written"
  # The kernels first, and interrupted at the end of its time, so that pytest writes what there is by then.
  timeout --signal=INT --kill-after=30 "$left" \
    "$PYTHON" -m pytest benchmarks/bench_kernels.py benchmarks/bench_layer.py -q --benchmark-only --device cuda \
    --dtypes bfloat16 --peers routed_peft,eager,aten,base --clocks graph,wall --seconds 0.3 --tb=short \
    --benchmark-columns=min,median,rounds --benchmark-json="$written"
  note "benchmarks" $?
  [ -s "$written" ] || { note "report of the benchmarks, which wrote nothing" 1; return; }
  "$PYTHON" benchmarks/report.py --out "$RESULTS" "$written"
  note "report of the benchmarks" $?
}

[ $# -gt 0 ] || set -- test sanitize bench
for part; do
  case $part in
    test | sanitize | bench) ;;
    *) printf 'no part %s: test, sanitize or bench\n' "$part" >&2; exit 2 ;;
  esac
done
for part; do
  deadline=$((SECONDS + SECONDS_EACH))
  printf '\n=== %s (at %d s)\n' "$part" "$SECONDS"
  build
  status=$?
  note "build for $part" $status
  [ $status -eq 0 ] || continue
  "run_$part"
done
if [ ${#failed[@]} -gt 0 ]; then
  printf '\n%d failed:\n' ${#failed[@]}
  printf '  %s\n' "${failed[@]}"
  exit 1
fi
printf '\nall passed in %d s\n' "$SECONDS"
