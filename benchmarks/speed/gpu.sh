#!/usr/bin/env bash
# Run the tests that need a GPU, then measure speed on it, in less than ten minutes together. Write
# gpu-tests.log and gpu.md to $OUT, build by default. Arguments: gpu.py --help
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python="${PYTHON:-$(command -v python || command -v python3)}" out="${OUT:-build}"
mkdir -p "$out"
timeout --kill-after 5 120 \
	"$python" -m pytest -q -W default -m gpu tests/training/test_gpu.py 2>&1 \
	| tee "$out/gpu-tests.log"
tests=$?
"$python" benchmarks/speed/gpu.py --out "$out/gpu.md" "$@" || exit
exit "$tests"
