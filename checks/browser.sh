#!/usr/bin/env bash
# Runs every kernel in a headless Chromium, by WebGPU on the processor, and asks the browser's own compiler about each shader:
#
#     checks/browser.sh                       # or: checks/browser.sh examples/browser 'epochs=20&width=128'
#
# TIMEOUT is in seconds. Needs the target wasm32-unknown-unknown, wasm-bindgen of the version in Cargo.lock, and a Chromium (CHROMIUM, chromium unless set).
set -euo pipefail
cd "$(dirname "$0")/.."

page=${1:-checks/page}
case "$page" in
    checks/page) package=memaop-checks library=memaop_checks options=(--locked --features webgpu) ;;
    examples/browser) package=memaop-browser library=memaop_browser options=(--locked) ;;
    *) echo "checks/browser.sh: the page must be checks/page or examples/browser, but is $page" >&2 && exit 2 ;;
esac
target=wasm32-unknown-unknown
cargo rustc -p "$package" --lib --crate-type cdylib --target "$target" "${options[@]}" --profile "${PROFILE:-dev}"
folder=${CARGO_TARGET_DIR:-target}/$target/$([ "${PROFILE:-dev}" = dev ] && echo debug || echo "$PROFILE")
wasm-bindgen --target web --out-dir "$page/pkg" "$folder/$library.wasm"
python3 checks/browser.py "$page" --browser "${CHROMIUM:-chromium}" --query "${2:-}" --timeout "${TIMEOUT:-600}"
