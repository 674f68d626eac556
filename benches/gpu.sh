#!/usr/bin/env bash
# The GPU tables of docs/gpu.md, wherever there is a GPU:
#
#     benches/gpu.sh vulkan            # nothing but a driver; or wgpu, metal, cuda, rocm
#     benches/gpu.sh vulkan f32 f16    # these types only
#
# Writes OUT/BENCHMARK-TYPE.json (OUT is target/gpu-BACKEND unless set) for each benchmark, and with
# PyTorch on the same card OUT/torch-TYPE.json. GPU="H100" prints what was measured beside the model of that name.
#
# BUILD=only builds the benches into target/gpu and stops; BENCHES=DIR runs those in a folder, on a machine without a
# compiler or a network. REPEATS is how often each side is timed, PROFILE another profile of cargo, OPTIONS more of the benches'.
# REHEARSAL=1 takes small sizes and two repeats, to see all of it run where there is no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."

backend=${1:?"usage: benches/gpu.sh BACKEND [TYPE...]"}
shift
case "$backend" in
    cuda | rocm) types=(f32 bf16) ;;
    *) types=(f32 f16) ;;
esac
[ $# -eq 0 ] || types=("$@")
benches=(layer conv step input transformer)
repeats=${REPEATS:-${REHEARSAL:+2}}
repeats=${repeats:-15}

bin=${BENCHES:-target/gpu}
if [ -z "${BENCHES:-}" ]; then
    mkdir -p "$bin"
    cargo bench --features "$backend,autotune,fusion" --profile "${PROFILE:-bench}" --no-run \
        --message-format json | python3 -c '
import json, shutil, sys
for line in sys.stdin:
    artifact = json.loads(line)
    if artifact.get("executable") and artifact["target"]["kind"] == ["bench"]:
        shutil.copy(artifact["executable"], sys.argv[1] + "/" + artifact["target"]["name"])
' "$bin"
fi
[ "${BUILD:-}" != only ] || exit 0

out=${OUT:-target/gpu-$backend}
mkdir -p "$out"
for type in "${types[@]}"; do
    common=(--bench --backend "$backend" --dtype "$type" --repeats "$repeats")
    for bench in "${benches[@]}"; do
        case "${REHEARSAL:+small }$bench" in
            step) options=(--width 4096 --m 8192) ;;
            transformer) options=(--width 1024 --heads 16 --batch 64 --length 128) ;;
            "small conv") options=(--images 8 --channels 8,16 --size 16) ;;
            "small step") options=(--width 128 --m 1024) ;;
            "small transformer") options=(--width 64 --heads 2 --blocks 1 --batch 8 --length 32) ;;
            "small "*) options=(--m 1024 --n 128 --p 128) ;;
            *) options=() ;;
        esac
        printf '\n== %s %s (%s s)\n' "$bench" "$type" "$SECONDS"
        # shellcheck disable=SC2086
        "$bin/$bench" "${common[@]}" "${options[@]}" ${OPTIONS:-} --json "$out/$bench-$type.json"
    done
    if python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
        python3 benches/torch_linear.py --dtype "$type" --json "$out/torch-$type.json"
    fi
    if [ -n "${GPU:-}" ]; then
        kind=$type
        [ "$type" != f16 ] || kind=bf16
        [ "$backend-$type" != cuda-f32 ] || kind=tf32
        python3 benches/gpu_model.py "$out/layer-$type.json" "$GPU" "$kind"
    fi
done
printf '\n== done (%s s)\n' "$SECONDS"
