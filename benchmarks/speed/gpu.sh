#!/usr/bin/env bash
# Measure speed on one GPU in less than ten minutes, and write build/gpu.md.
# Arguments: gpu.py --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p build
exec "${PYTHON:-python}" benchmarks/speed/gpu.py --out build/gpu.md "$@"
