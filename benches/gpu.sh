#!/usr/bin/env bash
# The GPU tables of docs/benchmarks.md, wherever there is a GPU:
#
#     benches/gpu.sh cuda              # or vulkan, wgpu, metal, rocm
#     benches/gpu.sh vulkan f32 f16    # these types only
#
# Writes OUT/BENCHMARK-TYPE.json (OUT is target/gpu-BACKEND unless set) for each benchmark, and with
# PyTorch on the same card OUT/torch-TYPE.json.
set -euo pipefail
cd "$(dirname "$0")/.."

backend=${1:?"usage: benches/gpu.sh BACKEND [TYPE...]"}
shift
case "$backend" in
    cuda | rocm) types=(f32 bf16) ;;
    *) types=(f32 f16) ;;
esac
[ $# -eq 0 ] || types=("$@")
out=${OUT:-target/gpu-$backend}
mkdir -p "$out"
out=$(cd "$out" && pwd)

bench=(cargo bench -p memaop-benches --features "$backend,autotune,fusion")
for type in "${types[@]}"; do
    options=(--backend "$backend" --dtype "$type")
    "${bench[@]}" --bench layer -- "${options[@]}" --json "$out/layer-$type.json"
    "${bench[@]}" --bench step -- "${options[@]}" --width 4096 --m 8192 --json "$out/step-$type.json"
    "${bench[@]}" --bench input -- "${options[@]}" --json "$out/input-$type.json"
    "${bench[@]}" --bench transformer -- "${options[@]}" --width 1024 --heads 16 --batch 64 --length 128 \
        --json "$out/transformer-$type.json"
    if python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
        python3 benches/torch_linear.py --dtype "$type" --json "$out/torch-$type.json"
    fi
done
