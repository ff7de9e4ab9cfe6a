#!/usr/bin/env bash
# One call on a machine with a GPU, kvkern not installed: build, tests, benchmarks, what `kvkern check` runs, the sanitizer.
#
#   OUT=folder LIMIT=580 bash bench/gpu_run.sh   by default bench/results/NAME-OF-THE-GPU, and at most 580 s in all
#   DEVICE=cpu OUT=folder bash bench/gpu_run.sh  a dry run where there is none: its tests are skipped, the rest runs small
#
# Writes log.txt and one JSON file a benchmark; a folder of an earlier run is taken up. Each step has a share of LIMIT by which
# it must have ended, so what one leaves over is for the next; one that has less than it needs for a first result is not begun:
#
#   20 % build   22 what is here   30 tests   53 layer   60 forms   71 document   80 engine   84 prefix   89 checks
#   100 sanitizer, less 5 s to end a step that ignores being stopped
#
# On an H100 with 16 cores the build took 15 s, the tests 54 s; a document of random-qwen3-4b 50 s, the engine 24 s before its
# first cell. Out of time is noted and does not end the run, for every benchmark checks its result in fp64 before it takes a
# time; a failure in the tests of what is promised does. An entry of layer that breaks the device has layer run again without it.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
SECONDS=0
LIMIT=${LIMIT:-580}
DEVICE=${DEVICE:-cuda}
OUT=${OUT:-bench/results/$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr -cs 'A-Za-z0-9\n' '-')}
mkdir -p "$OUT" || exit 1
LOG=$OUT/log.txt
: >"$LOG"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Once, so that results written meanwhile are no changes; a copy's own git may be of another commit, hence the caller's goes first.
if [[ -z ${KVKERN_COMMIT:-} && $(git rev-parse --show-toplevel 2>/dev/null) -ef . ]]; then
  KVKERN_COMMIT=$(git rev-parse HEAD)
  [[ -z $(git status --porcelain --untracked-files=no) ]] || KVKERN_COMMIT+=+changes
  export KVKERN_COMMIT
fi
summary=() failed=0

# left SHARE: seconds until that share of LIMIT, in percent, is over.
left() { echo $(($1 * (LIMIT - 5) / 100 - SECONDS)); }

# step NAME SHARE LEAST COMMAND...: its status, 124 where less than LEAST seconds are left; output goes to the log, its end to
# the terminal too.
step() {
  local name=$1 limit least=$3 began=$SECONDS status=0 word
  limit=$(left "$2")
  shift 3
  if ((limit < least)); then
    echo "== $name: $limit s left, needed $least" | tee -a "$LOG"
    summary+=("$(printf '%-14s not begun' "$name")")
    return 124
  fi
  echo "== $name, at most $limit s" | tee -a "$LOG"
  # Not through a pipe: a process that outlives its step would hold it open.
  timeout --kill-after=5 "$limit" "$@" >"$OUT/step.txt" 2>&1 || status=$?
  cat "$OUT/step.txt" >>"$LOG"
  tail -n 25 "$OUT/step.txt"
  case $status in
    0) word=done ;;
    75) word='to go on' ;;
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

step build 20 1 python3 setup.py egg_info build_ext --inplace || fail "not built"

here() {
  nvidia-smi || [[ $DEVICE == cpu ]] || return 1
  echo "commit ${KVKERN_COMMIT:-not known}"
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
step "what is here" 22 1 bash -c here || fail "no GPU that torch can use"

# Most of the time goes into compiling kernels, on the CPU.
workers=()
if [[ $DEVICE != cpu ]] && python3 -c 'import xdist' 2>/dev/null; then workers=(-n "$(($(nproc) / 2 + 1))"); fi
suite=(python3 -m pytest -p no:cacheprovider -v --maxfail=20 -m gpu)

step tests 30 15 "${suite[@]}" "${workers[@]}" -k 'not sanitizer' tests/test_gpu.py tests/test_store.py
status=$?
if ((status)); then
  # The optional kernel, dependent launches and the store are beside what the benchmarks measure by default.
  broken=$(grep -E 'FAILED|ERROR' "$OUT/step.txt" | grep -oE 'tests/[a-z_]+\.py::[^ ]+' | sort -u)
  if grep -qvE 'hopper|dependent|round_trip' <<<"$broken" && [[ -n $broken ]]; then fail "exactness failed: no benchmark"; fi
  if ((status != 124)) && [[ -z $broken ]]; then fail "the tests did not run: no benchmark"; fi
fi

small=()
if [[ $DEVICE == cpu ]]; then small=(--tiny); fi
# bench NAME SHARE LEAST OPTION...
bench() { step "$1" "$2" "$3" python3 "bench/bench_$1.py" --device "$DEVICE" --out "$OUT" "${@:4}"; }

# Again where an entry broke the device or ended the process (a signal, above 128): the next run goes on without it.
for _ in {1..12}; do
  bench layer 53 20 --seconds "$(($(left 53) - 15))" "${small[@]}"
  status=$?
  ((status == 75 || status > 128)) || break
done
if [[ $DEVICE != cpu ]]; then
  step forms 60 15 python3 bench/forms.py --device "$DEVICE" --out "$OUT" --only K1 cuts --seconds "$(($(left 60) - 5))"
fi
document=(--random-qwen3-4b --lengths 255 3774)
if [[ $DEVICE == cpu ]]; then document=(--tiny --lengths 100); fi
if grep -q -e "${document[0]}" bench/bench_document.py; then
  bench document 71 40 --seconds "$(($(left 71) - 15))" "${document[@]}"
fi
# What replays decode steps runs no Python of the model, so first with graphs, then a few cells without.
if [[ $DEVICE != cpu ]]; then
  bench engine 78 35 --fuse --graphs --agents 64 1024 1 --seconds "$(($(left 78) - 10))"
  bench engine 82 30 --fuse --agents 64 --documents 3774 --seconds "$(($(left 82) - 5))"
else
  bench engine 80 35 --seconds "$(($(left 80) - 10))" "${small[@]}"
fi
bench prefix 84 10
checks=(python3 -m pytest -q -p no:cacheprovider -p kvkern.checks.options --pyargs kvkern.checks "--device=$DEVICE")
step checks 89 10 "${checks[@]}"
step sanitizer 100 20 "${suite[@]}" "${workers[@]}" -k sanitizer tests/test_gpu.py
finish "results in $OUT"
