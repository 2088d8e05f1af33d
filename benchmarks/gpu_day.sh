#!/usr/bin/env bash
# Everything that awaits a GPU, in parts of under ten minutes:  benchmarks/gpu_day.sh [PART …]     (default: all)
#
#   tests   the numeric kernel tests on compiled kernels, CUDA graphs, a short run
#   bench   python -m kernels.bench: kernels against their peers, then a whole training step
#   train   toy-281m-attn on 256 px toy faces (32×32×32 latents), bf16, for as long as the part lasts; again = further
#
# Each part can be repeated: training resumes, results are overwritten. PYTHON names the interpreter (default python3); it
# needs torch >= 2.11, triton >= 3.6 and the packages of requirements.txt. OUT receives runs, logs and results.
# Without a GPU, DRY=1 goes through the same commands in miniature, to show that they run.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu_day}
DRY=${DRY:-}
mkdir -p "$OUT"
failed=""

part() {  # part NAME SECONDS COMMAND …: run with a limit, keep the output, remember a failure
    local name=$1 limit=$2; shift 2
    echo "== $name: $*"
    timeout --signal=TERM --kill-after=60 "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
    local status=${PIPESTATUS[0]}
    echo "== $name ended with $status"
    [ "$status" = 0 ] || failed="$failed $name"
}

run_tests() { part tests 590 env TWINPATH_GPU="$([ -z "$DRY" ] && echo 1 || echo 0)" "$PYTHON" -m pytest -q -rs tests/gpu tests/test_kernels.py tests/test_adamw8bit.py; }

run_bench() {
    part bench 590 "$PYTHON" -m kernels.bench ${DRY:+--quick}
    cp benchmarks/results/kernels-*.json "$OUT"/ 2>/dev/null
}

run_train() {
    local size=(--model toy-281m-attn --data toyfaces:20000 --resolution 256 --batch 256 --lr 2e-4 --images 2_000_000 --ema 0.05
                --log-every 25_600 --eval-every 128_000 --preview-every 128_000 --save-every 512_000 --keep 1)
    [ -z "$DRY" ] || size=(--model nano --data toyfaces:64 --resolution 64 --batch 8 --images 64 --log-every 32 --eval-every 0 --preview-every 0)
    # SIGTERM at the limit: train.py finishes its step, saves and exits 0
    part train 540 "$PYTHON" train.py "${size[@]}" --out "$OUT" --name train
    cp "$OUT"/train/log.jsonl "$OUT"/train-log.jsonl 2>/dev/null
}

for name in ${@:-tests bench train}; do
    case $name in
        tests | bench | train) "run_$name" ;;
        *) echo "gpu_day.sh: no part '$name'; wanted tests, bench, train" >&2; exit 2 ;;
    esac
done
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
