#!/usr/bin/env bash
# Everything that awaits a GPU, in parts of under ten minutes:
#
#     benchmarks/gpu_day.sh [PART …]          (default: selfcheck host tests bench step encode train)
#
#   selfcheck  python -m kernels.selfcheck: every kind of call of a training step of toy-281m-attn,
#           against torch in fp32 and against its time
#           needs nothing more
#   host    python benchmarks/host.py: what a step costs this machine's CPU
#           needs safetensors tqdm
#   tests   numeric kernel tests on compiled kernels, CUDA graphs, compile, DDP, a short run; also
#           one by one: gpu, kernels, adamw
#           needs pytest numpy safetensors pillow tqdm
#   bench   python benchmarks/kernels.py: kernels against their peers; also by section: groupnorm,
#           attention, optimizer
#           needs safetensors tqdm; bitsandbytes and torchao take part where installed
#   step    python benchmarks/kernels.py --parts step: whole training steps of toy-281m
#           needs safetensors tqdm; diffusers (with what it needs), and bitsandbytes or torchao,
#           take part where installed
#   tiles   python benchmarks/tiles.py: which tiles of attention and GroupNorm are fastest here
#           needs safetensors tqdm
#   encode  20,000 robohash kittens at 256 px to 32×32×32 latents; toy faces if robohash is not
#           installed
#           needs numpy safetensors pillow tqdm
#   train   toy-281m-attn on these in bf16, for as long as the part lasts; again = further
#           needs numpy safetensors pillow tqdm
#   graph   train.py on these for 400 steps of 64 images, with --no-graph and --graph: what it gains
#           (images_per_s in graph-off.log and graph-on.log), and that the losses are the same
#           needs numpy safetensors pillow tqdm
#   distill benchmarks/distill.py --size gpu: a teacher, an assessor, the ablation by FID,
#           progressive halving; again = further, many times
#           needs numpy safetensors pillow tqdm scipy matplotlib, and FID's weights
#           (python -m metrics.inception --fetch)
#   compare experiments/compare.py --size gpu on the latents of encode: flow matching against DDPM,
#           the first seed; again = further, many times
#           needs numpy safetensors pillow tqdm scipy matplotlib, and FID's weights
#           (python -m metrics.inception --fetch)
#   architecture  experiments/architecture.py --size gpu on these: U-Net against transformer, 71M at
#           256 px, the first seed; again = further, many times
#           needs numpy safetensors pillow tqdm scipy matplotlib, and FID's weights
#           (python -m metrics.inception --fetch)
#   text    python benchmarks/text.py: encoders and guided steps against transformers and diffusers
#           needs safetensors huggingface_hub pillow tqdm transformers diffusers
#   sdxl    benchmarks/sdxl_step.py: steps of fine-tuning SDXL to a flow: images/s, MFU, peak memory
#           needs safetensors tqdm
#   boost   benchmarks/boosting_sd.py: sd15 at 512 px, made 1024 px large by a network of toy-281m's
#           size, and what --uncertainty integrated costs: images/s by part, peak memory
#           needs numpy safetensors pillow tqdm
#   prompts train.py --text bytes on the latents of encode, then pictures of three prompts
#           needs numpy safetensors pillow tqdm
#
# All need torch >= 2.11 and triton >= 3.6. Each part can be repeated: training resumes, and bench
# finishes a section that was cut off, row by row. Where minutes are few, take them in this order:
# selfcheck kernels groupnorm attention optimizer step encode graph train.
# PYTHON names the interpreter (default python3). OUT receives runs, logs and results;
# OUT/kernels-<device>.json is also copied to benchmarks/results. Without a GPU, DRY=1 goes through
# the same commands in miniature, to show that they run.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu_day}
DRY=${DRY:-}
PARTS=" selfcheck host tests gpu kernels adamw bench groupnorm attention optimizer step tiles encode \
train graph distill compare architecture text sdxl boost prompts "
[ $# -gt 0 ] || set -- selfcheck host tests bench step encode train
for name in "$@"; do
    [ "$name" != --help ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 0; }
    if [[ $PARTS != *" $name "* ]]; then
        echo "gpu_day.sh: no part '$name'; wanted some of:$PARTS" >&2
        exit 2
    fi
done
if [ -z "$DRY" ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_day.sh: $PYTHON sees no GPU.  DRY=1 goes through the commands in miniature." >&2
    exit 2
fi
mkdir -p "$OUT"
failed=""

part() {  # part NAME SECONDS COMMAND …: run with a limit, keep the output, remember a failure
    local name=$1 limit=$2; shift 2
    echo "== $name: $*"
    # SIGINT, so that pytest still tells its failures; to this process alone, not to its workers;
    # with its own exit status
    timeout --foreground --preserve-status --signal=INT --kill-after=60 "$limit" "$@" 2>&1 \
        | tee "$OUT/$name.log"
    local status=${PIPESTATUS[0]}
    echo "== $name ended with $status"
    [ "$status" = 0 ] || failed="$failed $name"
}

run_tests() {  # run_tests NAME FILE …
    local name=$1 gpu=1; shift
    [ -z "$DRY" ] || gpu=0
    part "$name" 590 env TWINPATH_GPU="$gpu" "$PYTHON" -m pytest -v -rs --tb=short "$@" \
        ${DRY:+-k "gpu or opcheck or maps"}
}

test_kernels() {
    run_tests kernels tests/kernels/test_dispatch.py tests/kernels/test_groupnorm.py \
        tests/kernels/test_attention.py
}

test_adamw() {
    run_tests adamw tests/kernels/test_adamw8bit.py
}

run_kernels() {  # run_kernels NAME SECTIONS
    local device=cpu file
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' && device=cuda
    file=$OUT/kernels-$device.json
    part "$1" 590 "$PYTHON" benchmarks/kernels.py --parts "$2" --out "$file" ${DRY:+--quick}
    [ -n "$DRY" ] || cp "$file" benchmarks/results/
}

run_selfcheck() {
    local size=()
    [ -z "$DRY" ] || size=(--model nano --batch 1 --side 4 --dtype fp32)
    part selfcheck 300 env ${DRY:+TRITON_INTERPRET=1} "$PYTHON" -m kernels.selfcheck "${size[@]}"
}

run_host() {
    local size=()
    [ -z "$DRY" ] || size=(--model nano)
    part host 300 "$PYTHON" benchmarks/host.py "${size[@]}" --out "$OUT/host.json"
}

run_tiles() {
    local dry=()
    [ -z "$DRY" ] || dry=(--dry-run)
    part tiles 590 "$PYTHON" benchmarks/tiles.py --out "$OUT" "${dry[@]}"
}

run_encode() {
    local data=robohash:20000 side=256
    if ! "$PYTHON" -c 'import importlib.metadata as m; m.version("robohash")' 2>/dev/null; then
        data=toyfaces:20000
        echo "robohash is not installed: toy faces"
    fi
    [ -z "$DRY" ] || { data=${data%:*}:64; side=64; }
    part encode 590 "$PYTHON" -m data.encode --data "$data" --resolution "$side" \
        --out "$OUT/latents"
}

run_train() {
    local size=(--model toy-281m-attn --resolution 256 --batch 256 --lr 2e-4 --images 2_000_000
                --ema 0.05 --log-every 25_600 --eval-every 128_000 --preview-every 128_000
                --save-every 512_000 --keep 1)
    [ -z "$DRY" ] || size=(--model nano --batch 8 --images 64 --log-every 32 --eval-every 0
                           --preview-every 0)
    # at the limit train.py finishes its step, saves and exits 0
    part train 540 "$PYTHON" train.py "${size[@]}" --data "$OUT/latents" --out "$OUT" --name train
    cp "$OUT"/train/log.jsonl "$OUT"/train-log.jsonl 2>/dev/null
}

run_graph() {
    local size=(--model toy-281m-attn --resolution 256 --batch 64 --lr 2e-4 --images 25_600
                --ema 0.05 --log-every 2_560 --eval-every 0 --preview-every 0 --save-every 0)
    [ -z "$DRY" ] || size=(--model nano --batch 8 --images 64 --log-every 32 --eval-every 0
                           --preview-every 0)
    part graph-off 290 "$PYTHON" train.py "${size[@]}" --data "$OUT/latents" --out "$OUT" \
        --name graph-off --no-graph
    part graph-on 290 "$PYTHON" train.py "${size[@]}" --data "$OUT/latents" --out "$OUT" \
        --name graph-on --graph
}

run_distill() {
    local size=gpu
    [ -z "$DRY" ] || size=dry
    # at the limit the run that is under way saves
    part distill 570 "$PYTHON" benchmarks/distill.py --size "$size" --work "$OUT/distill"
}

run_compare() {
    local size=(--size gpu --data "$OUT/latents" --seeds 0)
    [ -z "$DRY" ] || size=(--size dry --seeds 0 --objectives D,F)
    # at the limit the run that is under way saves
    part compare 570 "$PYTHON" experiments/compare.py "${size[@]}" --out "$OUT/compare"
}

run_architecture() {
    local size=(--size gpu --data "$OUT/latents" --sizes 71m --resolutions 256 --seeds 0
                --images 400_000 --n 2048)
    [ -z "$DRY" ] || size=(--size dry)
    # at the limit the run that is under way saves
    part architecture 570 "$PYTHON" experiments/architecture.py "${size[@]}" \
        --out "$OUT/architecture"
}

run_text() {
    [ -z "$DRY" ] || { part text 60 "$PYTHON" benchmarks/text.py --dry-run; return; }
    part text 300 "$PYTHON" benchmarks/text.py --out "$OUT/text.json"
}

run_sdxl() {
    local size=(--batches 1,2,4)
    [ -z "$DRY" ] || size=(--batches 1,2 --mini)
    part sdxl 590 "$PYTHON" benchmarks/sdxl_step.py "${size[@]}" --out "$OUT/sdxl.json"
}

run_boost() {
    local size=(--batches 1,4,8)
    [ -z "$DRY" ] || size=(--batches 1,2 --rounds 2 --mini)
    part boost 590 "$PYTHON" benchmarks/boosting_sd.py "${size[@]}" --out "$OUT/boost.json"
}

run_prompts() {
    local size=(--model toy-281m --resolution 256 --batch 128 --lr 2e-4 --images 400_000
                --ema 0.1 --eval-every 0 --preview-every 0)
    [ -z "$DRY" ] || size=(--model nano --batch 8 --images 64 --log-every 32 --eval-every 0
                           --preview-every 0)
    part prompts 420 "$PYTHON" train.py "${size[@]}" --data "$OUT/latents" --out "$OUT" \
        --name prompts --text bytes --caption-shuffle --caption-drop 0.5 --shift 2
    printf '%s\n' "body:pink, eyes:calm" "body:blue, fur:tiger" "body:gold" > "$OUT/prompts.txt"
    part drawn 120 "$PYTHON" samplers.py --ckpt "$OUT/prompts" --prompt "@$OUT/prompts.txt" \
        --n 12 --cfg 5 --out "$OUT/prompts-drawn"
}

for name in "$@"; do
    case $name in
        selfcheck | host | tiles | encode | train | graph | distill | compare | architecture | text \
            | sdxl | boost | prompts) "run_$name" ;;
        tests) run_tests gpu tests/gpu; test_kernels; test_adamw ;;
        gpu) run_tests gpu tests/gpu ;;
        kernels) test_kernels ;;
        adamw) test_adamw ;;
        bench) run_kernels bench groupnorm,attention,optimizer ;;
        groupnorm | attention | optimizer | step) run_kernels "$name" "$name" ;;
    esac
done
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
