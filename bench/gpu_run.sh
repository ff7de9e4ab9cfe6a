#!/usr/bin/env bash
# On a machine with a GPU: build, run the exactness suite on it, then the benchmarks, then what `kvkern check` runs, and write
# JSON to $OUT. The suite decides: without it passing, no benchmark runs. Ends within 10 minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${OUT:-bench/results/$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr -c 'A-Za-z0-9\n' '_')}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python3 setup.py egg_info build_ext --inplace >"$OUT/build.log" 2>&1
timeout 300 python3 -m pytest -q -m gpu tests 2>&1 | tee "$OUT/exactness.log"
for script in bench/bench_*.py; do
  timeout 200 python3 "$script" --device cuda --out "$OUT" 2>&1 | tee "$OUT/$(basename "$script" .py).log"
done
timeout 120 python3 -m pytest -q -p no:cacheprovider -p kvkern.checks.options --pyargs kvkern.checks --device=cuda 2>&1 |
  tee "$OUT/checks.log"
