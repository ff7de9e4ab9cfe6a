#!/usr/bin/env bash
# One call on a machine with a GPU, kvkern not installed: build, exactness, then benchmarks, then what `kvkern check` runs.
#
#   OUT=folder bash bench/gpu_run.sh           by default bench/results/NAME-OF-THE-GPU
#   DEVICE=cpu OUT=folder bash bench/gpu_run.sh   a dry run where there is none: its tests are skipped, the rest runs small
#
# Writes log.txt and one JSON file a benchmark. Each step has the second by which it must have ended, so what one leaves over
# is for the next:
#
#    60 build   80 what is here   255 exactness   315 the optional kernel, dependent launches, sanitizer, store
#   445 layer  500 engine         540 prefix      575 checks           and 5 to end a step that ignores being stopped
#
# together at most 580 of 600. Out of time is noted and does not end the run, for every benchmark checks its result in fp64
# before it takes a time; a failure in the exactness step does.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
SECONDS=0
DEVICE=${DEVICE:-cuda}
OUT=${OUT:-bench/results/$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr -cs 'A-Za-z0-9\n' '-')}
mkdir -p "$OUT" || exit 1
LOG=$OUT/log.txt
: >"$LOG"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
summary=() failed=0

# step NAME SECOND COMMAND...: its status; output goes to the log, its end to the terminal too.
step() {
  local name=$1 limit=$(($2 - SECONDS)) began=$SECONDS status=0 word
  shift 2
  echo "== $name, at most $limit s" | tee -a "$LOG"
  if ((limit < 5)); then
    status=124
  else
    # Not through a pipe: a process that outlives its step would hold it open.
    timeout --kill-after=5 "$limit" "$@" >"$OUT/step.txt" 2>&1 || status=$?
    cat "$OUT/step.txt" >>"$LOG"
    tail -n 25 "$OUT/step.txt"
  fi
  case $status in
    0) word=done ;;
    124 | 137) word='out of time' status=124 ;;
    *) word="failed ($status)" failed=1 ;;
  esac
  summary+=("$(printf '%-14s %-12s %4d s' "$name" "$word" $((SECONDS - began)))")
  return "$status"
}

# fail WHY: the end of a run that has nothing more to do.
fail() {
  failed=1
  finish "$1"
}

finish() {
  rm -f "$OUT/step.txt"
  printf '%s\n' "== $1" "${summary[@]}" | tee -a "$LOG"
  exit "$failed"
}

step build 60 python3 setup.py egg_info build_ext --inplace || fail "not built"

here() {
  nvidia-smi || [[ $DEVICE == cpu ]] || return 1
  python3 - "$DEVICE" <<'PYTHON'
import importlib.metadata, importlib.util, platform, sys
import torch

print("python", platform.python_version(), "cuda", torch.version.cuda)
for name in ("kvkern", "torch", "triton", "transformers", "pytest", "pytest-xdist"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "is not installed")
if sys.argv[1] == "cuda":
    gpu = torch.cuda.get_device_properties(0)
    print(gpu.name, f"sm_{gpu.major}{gpu.minor}", gpu.multi_processor_count, "multiprocessors", gpu.total_memory, "B")
PYTHON
}
export DEVICE
export -f here
step "what is here" 80 bash -c here || fail "no GPU that torch can use"

# Most of the time goes into compiling kernels, on the CPU.
workers=()
if [[ $DEVICE != cpu ]] && python3 -c 'import xdist' 2>/dev/null; then workers=(-n "$(($(nproc) / 2 + 1))"); fi
suite=(python3 -m pytest -p no:cacheprovider -v --maxfail=20 -m gpu)
apart='hopper or dependent or sanitizer or round_trip'

step exactness 255 "${suite[@]}" "${workers[@]}" -k "not ($apart)" tests/test_gpu.py
case $? in
  0) ;;
  124) if grep -qE '(FAILED|ERROR)' "$OUT/step.txt"; then fail "exactness failed before it was out of time"; fi ;;
  *) fail "exactness failed: no benchmark" ;;
esac
step apart 315 "${suite[@]}" "${workers[@]}" -k "$apart" tests/test_gpu.py tests/test_store.py

small=()
if [[ $DEVICE == cpu ]]; then small=(--tiny); fi
bench() { step "$1" "$2" python3 "bench/bench_$1.py" --device "$DEVICE" --out "$OUT" "${@:3}"; }
bench layer 445 --seconds "$((445 - 20 - SECONDS))" "${small[@]}"
if [[ -f bench/bench_engine.py ]]; then bench engine 500 --seconds "$((500 - 20 - SECONDS))" "${small[@]}"; fi
bench prefix 540
step checks 575 python3 -m pytest -q -p no:cacheprovider -p kvkern.checks.options --pyargs kvkern.checks "--device=$DEVICE"
finish "results in $OUT"
