#!/usr/bin/env bash
# The whole story on a laptop, without a GPU or downloads beyond the packages: samples from the committed weights, then
# data, the three stages, samples of your own, and the layout scores of all. After an interruption, run it again: it
# goes on where it stopped.
#   bash scripts/quickstart.sh            15 minutes on two cores
#   bash scripts/quickstart.sh --smoke    a few steps of everything, to see that it works
# It writes to data/ and output/ of this folder, or of $QUICKSTART_ROOT if that is set (an absolute path).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ROOT="${QUICKSTART_ROOT:+$QUICKSTART_ROOT/}"
OUT="${ROOT}output/quickstart" DATA="${ROOT}data/mini_coco" CACHE="${ROOT}data/mini_cache"
MINI=pretrained_models/mini
NUM_TRAIN=6000 NUM_VAL=500 NUM_EVAL=250 EPOCHS1=2 EPOCHS2=7 UPDATES3=100 EXTRA=() EXTRA3=()
SAMPLE=() EVAL=()
if [ "${1:-}" = "--smoke" ]; then
    OUT="${OUT}_smoke" DATA="${DATA}_smoke" CACHE="${CACHE}_smoke"
    NUM_TRAIN=96 NUM_VAL=16 NUM_EVAL=4 EPOCHS1=1 EPOCHS2=2
    EXTRA=(--batch_size 24 --max_steps 4 --diffusion_batch_mul 1) UPDATES3=2
    EXTRA3=(--batch_size 2 --group_size 2 --num_iter 4 --num_sampling_steps 12)
    SAMPLE=(--num_iter 4 --num_sampling_steps 5)
    EVAL=("${SAMPLE[@]}" --num_resamples 20)
elif [ $# -gt 0 ]; then
    echo "usage: bash scripts/quickstart.sh [--smoke]" >&2
    exit 2
fi
step() { printf '\n== %s\n' "$*"; }

step "1/8 environment (.venv; a few minutes the first time)"
bash scripts/setup_env.sh
python=.venv/bin/python
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" TOKENIZERS_PARALLELISM=false
source scripts/mini/precision.sh
echo "training in $PRECISION with $OMP_NUM_THREADS threads"

step "2/8 samples from the committed weights: continuous tokens, then codes in eight iterations (under a minute)"
$python -m scripts.sample --config configs/mini_sample.yaml --output_dir "$OUT/committed" ${SAMPLE[@]+"${SAMPLE[@]}"}
$python -m scripts.sample --config configs/mini_discrete_sample.yaml --output_dir "$OUT/committed_codes" \
    ${SAMPLE[@]+--num_iter 4}

step "3/8 the mini world: $NUM_TRAIN training and $NUM_VAL held-out scenes, their latents and text states (2 minutes)"
$python -m scripts.mini.make_dataset --output_dir "$DATA" --num_train "$NUM_TRAIN" --num_val "$NUM_VAL"
$python -m scripts.cache_latents --coco_root "$DATA" --coco_split train2017 --cached_path "$CACHE/train2017" \
    --vae_path $MINI/vae/kl8_mini.ckpt --clip_path $MINI/clip-text-mini \
    --img_size 64 --device cpu --num_workers 0

COMMON=(--coco_root "$DATA" --cached_path "$CACHE/train2017" --precision "$PRECISION" --num_threads "$OMP_NUM_THREADS")
step "4/8 stage 1, align: the new parts learn beside the frozen MAR (2 minutes)"
$python main_mar.py --config configs/mini_stage1.yaml --output_dir "$OUT/stage1" --epochs "$EPOCHS1" \
    "${COMMON[@]}" ${EXTRA[@]+"${EXTRA[@]}"}

step "5/8 stage 2, SFT: everything learns (8 minutes)"
$python main_mar.py --config configs/mini_stage2.yaml --output_dir "$OUT/stage2" --epochs "$EPOCHS2" \
    --resume "$OUT/stage1/checkpoint-last.pth" --ema_rate 0.99 "${COMMON[@]}" ${EXTRA[@]+"${EXTRA[@]}"}

step "6/8 stage 3, GRPO: $UPDATES3 updates on the reward of a frozen detector (9 minutes)"
$python main_rl.py --config configs/mini_stage3.yaml --output_dir "$OUT/stage3" --max_rl_steps "$UPDATES3" \
    --resume "$OUT/stage2/checkpoint-last.pth" --eval_freq "$UPDATES3" --eval_images "$NUM_EVAL" \
    "${COMMON[@]}" ${EXTRA3[@]+"${EXTRA3[@]}"}

step "7/8 samples of your own model (under a minute)"
$python -m scripts.sample --config configs/mini_sample.yaml --resume "$OUT/stage3/checkpoint-last.pth" \
    --output_dir "$OUT/samples" ${SAMPLE[@]+"${SAMPLE[@]}"}

step "8/8 evaluation on $NUM_EVAL held-out scenes by another detector: the committed weights, then your own (3 minutes)"
EVALUATIONS=()
for which in committed own_stage2 own_stage3; do
    EVALUATIONS+=("$OUT/evaluation_$which")
    weights="$MINI/structmar_mini_stage2.safetensors"
    if [ $which != committed ]; then weights="$OUT/${which#own_}/checkpoint-last.pth"; fi
    $python -m scripts.evaluate_layout --config configs/mini_eval.yaml --coco_root "$DATA" --max_images "$NUM_EVAL" \
        --name "StructMAR ($which)" --resume "$weights" --detector $MINI/fasterrcnn_mini_judge.pth \
        --precision "$PRECISION" --num_threads "$OMP_NUM_THREADS" --output_dir "$OUT/evaluation_$which" \
        --bounds_dir "$OUT/bounds" ${EVAL[@]+"${EVAL[@]}"} >/dev/null # its table is part of the one below
done

printf '\nBefore and after stage 3, sampled as its rollouts are (no guidance), by the other detector:\n'
grep 'evaluation of' "$OUT/stage3/log.txt" | sed 's/^.* evaluation of/    /'
printf 'The committed weights: %s\n' "$OUT/committed/grid.png" "$OUT/committed_codes/grid.png" \
    "$OUT/evaluation_committed/report.html"
printf 'Your own model:        %s\n' "$OUT/samples/grid.png" "$OUT/evaluation_own_stage2/report.html" \
    "$OUT/evaluation_own_stage3/report.html"
printf 'TensorBoard:           .venv/bin/tensorboard --logdir %s\n' "$OUT"

printf '\nAll three, and how far your own are from the committed weights:\n\n'
$python -m scripts.compare "${EVALUATIONS[@]}"
printf '\nBoxes of your own, on a page in the browser: .venv/bin/python -m scripts.page\n'
