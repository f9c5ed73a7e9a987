#!/usr/bin/env bash
# What control costs on one NVIDIA GPU, and whether the laws hold there, in under ten minutes on a bare machine:
#
#   benchmarks/gpu.sh --pack      here, with the registry in reach: puts what such a machine lacks into .gpu/
#   benchmarks/gpu.sh             there, from the project's root, with .gpu/ carried along
#   benchmarks/gpu.sh --dry-run   the same parts, tiny and on a CPU, by .venv's Python
#
# The machine needs an H100 or H200, and a python3 with torch, triton, transformers, accelerate and pytest; nothing is
# fetched there. Parts have a time limit each, and all together 580 s. What each measured is in a JSON file of its own in
# $OUT (by default runs/gpu), written as it ends, and how each ended in summary.json. PARTS names fewer of them. A dry
# run has four times as long, since nobody waits for it and the CPUs may be busy.
#
#   edit            launches of an edit, and its times: by torch's operations, by the kernels, recorded as a CUDA graph
#   laws            `pytest -m gpu`: the laws, and the kernels against torch's operations
#   offline         tokens a second at 1, 32 and 256 rows beside transformers' generate, without, with one and three heads
#   offline-torch   this engine with one head by torch's operations, as it was before the kernels
#   long            prompts of 2,048 tokens at 32 rows beside transformers' generate
#   vllm            control inside vLLM at 32 and 256 rows, where vLLM is installed
set -u
cd "$(dirname "$0")/.."
OUT="${OUT:-runs/gpu}"
PARTS="${PARTS:-edit laws offline offline-torch long vllm}"
SHAPE=.gpu/llama-3.2-1b
WHEELS="annotated-types fastapi gguf platformdirs pydantic pydantic-core pydantic-settings pytest-asyncio \
python-dotenv starlette typing-inspection uvicorn"
TOTAL_S=580
SLOWER=1

pack() {
    local python=.venv/bin/python name pins=()
    mkdir -p .gpu/wheels .gpu/site
    for name in $WHEELS; do pins+=("$name==$("$python" -c "import importlib.metadata as m; print(m.version('$name'))")"); done
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        --dest .gpu/wheels "${pins[@]}" || return 1
    "$python" -m benchmarks.speed.shape llama-3.2-1b "$SHAPE" || return 1
    # So that the benchmark finds this project's version without an installation.
    local version
    version="$("$python" -c "import importlib.metadata as m; print(m.version('recontrol'))")"
    mkdir -p ".gpu/site/recontrol-$version.dist-info"
    printf 'Metadata-Version: 2.1\nName: recontrol\nVersion: %s\n' "$version" >".gpu/site/recontrol-$version.dist-info/METADATA"
    du -sh .gpu
    echo "carry .gpu, and run benchmarks/gpu.sh"
}

set_up() { # on the machine with the GPU
    PYTHON="${PYTHON:-python3}"
    if [ -d .gpu/wheels ] && ! "$PYTHON" -c 'import fastapi, gguf, pydantic_settings' 2>/dev/null; then
        SITE="$(mktemp -d)"
        "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$SITE" .gpu/wheels/*.whl
        PYTHONPATH="$SITE:$PYTHONPATH"
    fi
    ROWS=1,32,256 FEW_ROWS=32 VLLM_ROWS=32,256 LONG_PROMPT=2048 REPEATS=3 NEW_TOKENS=64
    DEVICE=(--random-weights "$SHAPE" --device cuda --dtype bfloat16)
    EDIT=(--time --rows "$ROWS")
}

set_up_dry() { # on a CPU
    PYTHON="${PYTHON:-.venv/bin/python}"
    ROWS=1,2 FEW_ROWS=2 VLLM_ROWS=2 LONG_PROMPT=128 REPEATS=1 NEW_TOKENS=4
    DEVICE=(--random-weights tiny --device cpu --dtype float32)
    TOTAL_S=$((4 * TOTAL_S)) SLOWER=4
    EDIT=(--time --rows "$ROWS" --hidden 64 --vocabulary 512 --repeats 1)
    export TRITON_INTERPRET=1
}

speed() { # part, flags
    local name="$1" && shift
    "$PYTHON" -m benchmarks.speed "${DEVICE[@]}" --only offline --new-tokens "$NEW_TOKENS" --work "$WORK" \
        --out "$OUT/$name.json" "$@"
}

edit() { "$PYTHON" -m benchmarks.edit "${EDIT[@]}" --out "$OUT/edit.json"; }

laws() {
    "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/engines/test_on_a_gpu.py tests/control/test_fused.py \
        tests/control/test_fused_over_pinned.py tests/kernels/test_draw.py >"$WORK/laws.txt" 2>&1
    local status=$?
    tail -n 30 "$WORK/laws.txt"
    LAWS="$(tail -n 1 "$WORK/laws.txt")" "$PYTHON" -c 'import json, os; print(json.dumps({"laws": os.environ["LAWS"]}))' >"$OUT/laws.json"
    return $status
}

offline() {
    speed offline --batch-sizes "$ROWS" --repeats "$REPEATS" \
        --peers recontrol,recontrol-1-head,recontrol-3-heads,transformers
}

offline-torch() {
    RECONTROL_KERNELS=torch speed offline-torch --batch-sizes "$FEW_ROWS" --repeats "$REPEATS" --peers recontrol,recontrol-1-head
}

long() {
    speed long --batch-sizes "$FEW_ROWS" --repeats "$REPEATS" --prompt-tokens "$LONG_PROMPT" --peers recontrol,transformers
}

vllm() {
    speed vllm --batch-sizes "$VLLM_ROWS" --repeats "$REPEATS" \
        --peers vllm,vllm-control,vllm-control-1-head,vllm-control-3-heads
}

limit_of() {
    case "$1" in edit) echo 60 ;; laws) echo 120 ;; offline) echo 180 ;; offline-torch) echo 50 ;; long) echo 70 ;; *) echo 100 ;; esac
}

carry_out() { # part: in a process of its own, within its limit and what is left of all
    local name="$1" left limit started status
    left=$((TOTAL_S - SECONDS)) limit=$((SLOWER * $(limit_of "$1"))) started="$SECONDS"
    [ "$left" -lt "$limit" ] && limit="$left"
    if [ "$limit" -le 0 ]; then
        tell "$name" "left out: no time" 0
    elif [ "$name" = vllm ] && ! "$PYTHON" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("vllm"))'; then
        tell "$name" "left out: vLLM is not installed" 0
    else
        timeout --kill-after=5 "$limit" "$BASH" benchmarks/gpu.sh --part "$name"
        status=$?
        case "$status" in
            0) tell "$name" "done" $((SECONDS - started)) ;;
            124 | 137) tell "$name" "stopped after $limit s" $((SECONDS - started)) ;;
            *) tell "$name" "failed with status $status" $((SECONDS - started)) ;;
        esac
    fi
}

tell() { # part, how it ended, seconds
    SUMMARY="$SUMMARY${SUMMARY:+, }\"$1\": {\"end\": \"$2\", \"seconds\": $3}"
    printf '{"is_dry_run": %s, "parts": {%s}}\n' "$IS_DRY" "$SUMMARY" >"$OUT/summary.json"
    printf '== %s: %s (%s s)\n' "$1" "$2" "$3"
}

main() {
    IS_DRY=false
    case "${1:-}" in
        --pack) pack && return ;;
        --dry-run) IS_DRY=true ;;
        --part) IS_DRY="$IS_DRY_RUN" ;;
        "") ;;
        *) echo "gpu.sh: '$1' is not known; there are --pack and --dry-run" >&2 && return 2 ;;
    esac
    export PYTHONPATH="$PWD:$PWD/.gpu/site${PYTHONPATH:+:$PYTHONPATH}" IS_DRY_RUN="$IS_DRY" WORK="${WORK:-runs/gpu-work}" OUT
    if [ "$IS_DRY" = true ]; then set_up_dry; else set_up; fi
    export PYTHON
    mkdir -p "$OUT" "$WORK"
    if [ "${1:-}" = --part ]; then
        "$2"
        return
    fi
    local name known=" edit laws offline offline-torch long vllm "
    SUMMARY=""
    for name in $PARTS; do
        case "$known" in *" $name "*) ;; *) echo "gpu.sh: PARTS: there is no $name; there are$known" >&2 && return 2 ;; esac
    done
    for name in $PARTS; do carry_out "$name"; done
    ! grep -Eq '"(failed|stopped)' "$OUT/summary.json"
}

main "$@"
