#!/usr/bin/env bash
# MARS in the mini world: a frozen language model learns to draw and to describe, in English and in Chinese.
#   bash scripts/mini/mars.sh            by the CPU time of its steps 20 minutes of two cores, then table.md
#   bash scripts/mini/mars.sh --smoke    a few steps of everything, to see that it works
# Scenes with captions in both languages, a small language model that learns to write these (LM=FOLDER takes another
# one, such as that of scripts/mini/smollm2.sh), then STEPS steps of stage I (1125), REFINE steps of stage II (0: none).
# Both are made whole epochs, of 375 steps, upwards: at an epoch's end the learning rate has come down all its way.
# IMAGES (100) held-out scenes are described, and drawn from English and from Chinese; table.md has what was right, beside
# a StructMAR with captions alone. What is finished is kept, what was interrupted goes on. Everything goes to
# output/mini/mars_<STEPS>_steps of this folder, or of $MARS_ROOT if that is set (an absolute path); data/ is looked for,
# or made, there too. Weights are in joint/ or refine_<REFINE>_steps/ of it, table.md beside them in <IMAGES>_scenes/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

MINI=pretrained_models/mini
VQ=$MINI/vq/vq4_mini.pt
ROOT="${MARS_ROOT:+$MARS_ROOT/}"
DATA="${ROOT}data/mini_coco" CACHE="${ROOT}data/mini_cache_vq" OUTPUT="${ROOT}output/mini"
STEPS="${STEPS:-1125}" REFINE="${REFINE:-0}" IMAGES="${IMAGES:-100}"
NUM_TRAIN=6000 NUM_VAL=500 BATCH=16 SUFFIX="" LM_FLAGS=() LOOK=() SCORE=()
case "${1:-}" in
    "") ;;
    --smoke)
        DATA="${DATA}_smoke" CACHE="${CACHE}_smoke" SUFFIX=_smoke
        STEPS=4 REFINE=4 IMAGES=4 NUM_TRAIN=64 NUM_VAL=16 BATCH=16
        LM_FLAGS=(--steps 3 --vocab_size 300 --width 32 --depth 2)
        LOOK=(--eval_images 4 --num_preview 2) SCORE=(--num_resamples 20)
        ;;
    *) echo "usage: [STEPS=1125] [REFINE=0] [IMAGES=100] [LM=FOLDER] bash scripts/mini/mars.sh [--smoke]" >&2 && exit 2 ;;
esac
EPOCH=$((NUM_TRAIN / BATCH))
STEPS=$(((STEPS + EPOCH - 1) / EPOCH * EPOCH)) REFINE=$(((REFINE + EPOCH - 1) / EPOCH * EPOCH))
OUT="${OUTPUT}/mars_${STEPS}_steps${SUFFIX}"
step() { printf '\n== %s\n' "$*"; }

bash scripts/setup_env.sh
python=.venv/bin/python
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" TOKENIZERS_PARALLELISM=false
source scripts/mini/precision.sh

step "scenes, with captions in English and Chinese"
$python -m scripts.mini.make_dataset --output_dir "$DATA" --num_train "$NUM_TRAIN" --num_val "$NUM_VAL" --chinese
if [ -z "${LM:-}" ]; then
    LM="${OUTPUT}/lm-mini${SUFFIX}"
    step "a language model of these captions: $LM"
    $python -m scripts.mini.train_lm --data "$DATA" --output "$LM" ${LM_FLAGS[@]+"${LM_FLAGS[@]}"}
fi
step "codes of the scenes"
$python -m scripts.cache_latents --coco_root "$DATA" --coco_split train2017 --cached_path "$CACHE/train2017" \
    --vae_path $VQ --no-text --img_size 64 --device cpu --num_workers 0

train() { # FOLDER STEPS FLAGS...
    $python main_mar.py --config configs/mini_mars.yaml --output_dir "$1" --coco_root "$DATA" \
        --cached_path "$CACHE/train2017" --lm_path "$LM" --vae_path $VQ --batch_size "$BATCH" \
        --epochs "$(($2 / EPOCH))" --num_threads "$OMP_NUM_THREADS" \
        --precision "$PRECISION" ${LOOK[@]+"${LOOK[@]}"} "${@:3}"
}
step "stage I: $STEPS steps of drawing and describing"
WEIGHTS="$OUT/joint"
train "$WEIGHTS" "$STEPS"
if [ "$REFINE" -gt 0 ]; then
    step "stage II: $REFINE steps of drawing alone"
    WEIGHTS="$OUT/refine_${REFINE}_steps"
    train "$WEIGHTS" "$REFINE" --train_mode refine --resume "$OUT/joint/checkpoint-last.pth" --lr 5e-4
fi

RESULTS="$WEIGHTS/${IMAGES}_scenes"
measure() { # NAME FLAGS...: one file of results, kept
    if [ -e "$RESULTS/$1.json" ]; then return; fi
    $python -m "scripts.mini.$1" --resume "$WEIGHTS" --lm_path "$LM" --vae_path $VQ --coco_root "$DATA" \
        --num_scenes "$IMAGES" --num_threads "$OMP_NUM_THREADS" --device cpu --output "$RESULTS/$1.json" \
        ${SCORE[@]+"${SCORE[@]}"} "${@:2}"
}
step "captions of $IMAGES held-out scenes, drawings from both languages, and the text that stays as it was"
measure caption_accuracy
measure drawing_accuracy --batch_size 50 --cfg 3 --structmar $MINI/structmar_mini_stage2.safetensors \
    --grid "$RESULTS/drawings.png"
measure text_equality
$python -m scripts.mini.mars_table --captions "$RESULTS/caption_accuracy.json" --drawings "$RESULTS/drawing_accuracy.json" \
    --text "$RESULTS/text_equality.json" --output "$RESULTS/table.md"
