#!/usr/bin/env bash
# The kernel tests under compute-sanitizer: memory accesses, then races. Needs an NVIDIA GPU and the CUDA toolkit.
#
#   tools/check_kernels.sh FOLDER [SECONDS [TOOL...]]
#
# Logs and pytest's output go into FOLDER; SECONDS per tool (default 600); TOOL is memcheck, racecheck or both (default).
#
# PyTorch's allocator is told not to cache, so that an access beyond a tensor is one beyond its allocation. API return
# codes are left out: libraries probe what a device can do by calls that fail. Tests that fill many GB stay out.
set -u
folder=${1:?folder for the logs}
limit=${2:-600}
shift $(($# < 2 ? $# : 2))
[ $# -gt 0 ] || set -- memcheck racecheck
mkdir -p "$folder"
tests="(rows_move or gradients or block_scores or nan_in_keys or segmented) and not beyond and not billion"
for tool; do
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$limit" compute-sanitizer --tool "$tool" --report-api-errors no \
    --print-limit 20 --log-file "$folder/$tool.log" \
    python3 -m pytest -m gpu -n 0 -p no:cacheprovider tests/gpu/test_kernels.py -k "$tests" >"$folder/$tool.tests" 2>&1
  echo "$tool: exit $?; $(tail -n 1 "$folder/$tool.tests"); $(tail -n 1 "$folder/$tool.log")"
done
