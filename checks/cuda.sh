#!/usr/bin/env bash
# Compiles every kernel as the CUDA C++ that CubeCL writes, by NVRTC, without a GPU, a driver or a toolkit:
#
#     checks/cuda.sh               # for compute capability 9.0
#     checks/cuda.sh 75 80 120
#
# NVRTC and its headers are those of CUDA_PATH, or come from PyPI (by pip) into target/nvrtc. Needs a C compiler and nm.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=$PWD/target/nvrtc
mkdir -p "$folder"
if [ -z "${CUDA_PATH:-}" ]; then
    CUDA_PATH=$folder/nvidia/cu13
    [ -d "$CUDA_PATH" ] || python3 -m pip install --quiet --no-deps --target "$folder" \
        nvidia-cuda-nvrtc==13.5.37 nvidia-cuda-runtime==13.5.37 nvidia-cuda-crt==13.5.37 nvidia-cuda-cccl==13.3.5.0.6
fi
CUDA_PATH=$(realpath "$CUDA_PATH")
export CUDA_PATH

# Without LLVM, which CubeCL's CUDA runtime links and its C++ has no use for.
export DOCS_RS=1
binary=$(cargo test -p memaop-checks --features cuda --test cuda --no-run --message-format json | python3 -c '
import json, sys
for line in sys.stdin:
    artifact = json.loads(line)
    if artifact.get("executable") and artifact["target"]["name"] == "cuda":
        print(artifact["executable"])')
nm -u "$binary" | awk '$2 ~ /^(LLVM|cubecl_)/ { print "void " $2 "(void) { __builtin_trap(); }" }' |
    gcc -shared -fPIC -x c -o "$folder/libllvm_none.so" -
gcc -shared -fPIC -Wall -Wextra -o "$folder/libcuda.so" checks/driver.c

for capability in "${@:-90}"; do
    printf '\n== compute capability %s\n' "$capability"
    CAPABILITY=$capability LD_LIBRARY_PATH="$folder:$CUDA_PATH/lib:$CUDA_PATH/lib64" LD_PRELOAD="$folder/libllvm_none.so" \
        "$binary" kernels_are_valid_cuda figures_are_waited_for_when_the_next_are_measured --ignored --exact --nocapture
done
