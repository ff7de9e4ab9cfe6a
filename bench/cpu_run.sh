#!/usr/bin/env bash
# What the README says of a CPU, measured anew within 20 minutes on a machine that has nothing else to do.
#
#   bash bench/cpu_run.sh                 results to bench/results/NAME-OF-THIS-MACHINE, then every table and figure
#   PYTHON=.venv/bin/python bash bench/cpu_run.sh
#
# First the best instruction set, then AVX2 where it is not the best: beside one peer, for torch keeps to the best. A cell that the
# file holds is not run again: what was cut off goes on with the next call, and for new numbers the file has to go first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

layer() { "$PYTHON" bench/bench_layer.py --device cpu --aims --threads-gain --here "$@"; }

unset KVKERN_ISA
failed=0
layer --seconds "${SECONDS_BEST:-660}" || failed=1
if "$PYTHON" -c 'from kvkern import _C; raise SystemExit("avx2" not in _C.instruction_sets()[1:])'; then
  KVKERN_ISA=avx2 layer --peers flash_rows --seconds "${SECONDS_AVX2:-300}" || failed=1
fi
"$PYTHON" bench/report.py # of what there is
exit "$failed"
