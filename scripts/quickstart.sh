#!/usr/bin/env bash
# The whole story on a laptop, without a GPU or downloads beyond the packages: samples from the committed weights, then
# data, stage 1, stage 2, samples of your own, and the layout scores of both. Run it again after an interruption: it goes
# on where it stopped.
#   bash scripts/quickstart.sh            27 minutes on two cores that other work slowed for the first 17
#   bash scripts/quickstart.sh --smoke    a few steps of everything, to see that it works
# It writes to data/ and output/ of this folder, or of $QUICKSTART_ROOT if that is set (an absolute path).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ROOT="${QUICKSTART_ROOT:+$QUICKSTART_ROOT/}"
OUT="${ROOT}output/quickstart" DATA="${ROOT}data/mini_coco" CACHE="${ROOT}data/mini_cache"
MINI=pretrained_models/mini
NUM_TRAIN=6000 NUM_VAL=500 NUM_EVAL=250 EPOCHS1=2 EPOCHS2=7 EXTRA=()
SAMPLE=() EVAL=()
if [ "${1:-}" = "--smoke" ]; then
    OUT="${OUT}_smoke" DATA="${DATA}_smoke" CACHE="${CACHE}_smoke"
    NUM_TRAIN=96 NUM_VAL=16 NUM_EVAL=4 EPOCHS1=1 EPOCHS2=2
    EXTRA=(--batch_size 24 --max_steps 4 --diffusion_batch_mul 1) SAMPLE=(--num_iter 4 --num_sampling_steps 5)
    EVAL=("${SAMPLE[@]}" --num_resamples 20)
elif [ $# -gt 0 ]; then
    echo "usage: bash scripts/quickstart.sh [--smoke]" >&2
    exit 2
fi
step() { printf '\n== %s\n' "$*"; }

step "1/7 environment (.venv; a few minutes the first time)"
bash scripts/setup_env.sh
python=.venv/bin/python
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" TOKENIZERS_PARALLELISM=false
source scripts/mini/precision.sh
echo "training in $PRECISION with $OMP_NUM_THREADS threads"

step "2/7 samples from the committed stage-2 weights (under a minute)"
$python -m scripts.sample --config configs/mini_sample.yaml --output_dir "$OUT/committed" ${SAMPLE[@]+"${SAMPLE[@]}"}

step "3/7 the mini world: $NUM_TRAIN training and $NUM_VAL held-out scenes, their latents and text states (3 minutes)"
$python -m scripts.mini.make_dataset --output_dir "$DATA" --num_train "$NUM_TRAIN" --num_val "$NUM_VAL"
$python -m scripts.cache_latents --coco_root "$DATA" --coco_split train2017 --cached_path "$CACHE/train2017" \
    --vae_path $MINI/vae/kl8_mini.ckpt --clip_path $MINI/clip-text-mini \
    --img_size 64 --device cpu --num_workers 0

COMMON=(--coco_root "$DATA" --cached_path "$CACHE/train2017" --precision "$PRECISION" --num_threads "$OMP_NUM_THREADS"
    ${EXTRA[@]+"${EXTRA[@]}"})
step "4/7 stage 1, align: the new parts learn beside the frozen MAR (2 minutes)"
$python main_mar.py --config configs/mini_stage1.yaml --output_dir "$OUT/stage1" --epochs "$EPOCHS1" "${COMMON[@]}"

step "5/7 stage 2, SFT: everything learns (6 minutes)"
$python main_mar.py --config configs/mini_stage2.yaml --output_dir "$OUT/stage2" --epochs "$EPOCHS2" \
    --resume "$OUT/stage1/checkpoint-last.pth" --ema_rate 0.99 "${COMMON[@]}"

step "6/7 samples of your own model (under a minute)"
$python -m scripts.sample --config configs/mini_sample.yaml --resume "$OUT/stage2/checkpoint-last.pth" \
    --output_dir "$OUT/samples" ${SAMPLE[@]+"${SAMPLE[@]}"}

step "7/7 evaluation on $NUM_EVAL held-out scenes: the committed weights, then your own model (6 minutes)"
for which in committed own; do
    if [ $which = own ]; then weights="$OUT/stage2/checkpoint-last.pth"; else weights="$MINI/structmar_mini_stage2.safetensors"; fi
    $python -m scripts.evaluate_layout --config configs/mini_eval.yaml --coco_root "$DATA" --max_images "$NUM_EVAL" \
        --name "StructMAR ($which)" --resume "$weights" --precision "$PRECISION" --num_threads "$OMP_NUM_THREADS" \
        --output_dir "$OUT/evaluation_$which" ${EVAL[@]+"${EVAL[@]}"}
done

printf '\nThe committed weights: %s\n                       %s\nYour own model:        %s\n                       %s\n' \
    "$OUT/committed/grid.png" "$OUT/evaluation_committed/report.html" "$OUT/samples/grid.png" "$OUT/evaluation_own/report.html"
printf 'TensorBoard:           .venv/bin/tensorboard --logdir %s\n' "$OUT"
