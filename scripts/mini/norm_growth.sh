#!/usr/bin/env bash
# What do norms behind attention and MLP, and norms of queries and keys, hold back? Four variants of maskgil_mini trained
# alike in the mini world, then how large the residual stream and the attention logits grew.
#   bash scripts/mini/norm_growth.sh            four trainings, then norms.json and norms.png
#   bash scripts/mini/norm_growth.sh --smoke    a few steps of everything, to see that it works
# Every variant trains all its parts from the same first weights for STEPS optimizer steps (600) of 48 images, the same
# scenes in the same order, with three times the learning rate of configs/mini_discrete.yaml, whose other settings hold.
# Finished trainings are kept, interrupted ones go on. Everything goes to output/mini/norms_<STEPS>_steps of this folder,
# or of $NORMS_ROOT if that is set (an absolute path); data/ is looked for, or made, there too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

VARIANTS="pre pre_qk_norm res_post res_post_qk_norm"
variant_flags() {
    case "$1" in
        pre) echo "--norm_position pre --qk_norm none" ;;
        pre_qk_norm) echo "--norm_position pre --qk_norm head_rms" ;;
        res_post) echo "--norm_position res_post --qk_norm none" ;;
        res_post_qk_norm) echo "--norm_position res_post --qk_norm head_rms" ;;
    esac
}
usage() {
    echo "usage: [STEPS=600] bash scripts/mini/norm_growth.sh [--smoke]" >&2
    exit 2
}

ROOT="${NORMS_ROOT:+$NORMS_ROOT/}"
DATA="${ROOT}data/mini_coco" CACHE="${ROOT}data/mini_cache_vq"
STEPS="${STEPS:-600}"
NUM_TRAIN=6000 NUM_VAL=500 BATCH=48 IMAGES=32 SUFFIX=""
while [ $# -gt 0 ]; do
    case "$1" in
        --smoke)
            DATA="${DATA}_smoke" CACHE="${CACHE}_smoke" SUFFIX="_smoke"
            STEPS=2 NUM_TRAIN=96 NUM_VAL=16 BATCH=24 IMAGES=4
            ;;
        *) usage ;;
    esac
    shift
done
OUT="${ROOT}output/mini/norms_${STEPS}_steps${SUFFIX}"
EPOCHS=$(((STEPS * BATCH + NUM_TRAIN - 1) / NUM_TRAIN))
KEEP_EVERY=$(((STEPS + 5) / 6)) # six checkpoints of a run
LR=3e-3
VQ=pretrained_models/mini/vq/vq4_mini.pt
CLIP=pretrained_models/mini/clip-text-mini
step() { printf '\n== %s\n' "$*"; }

bash scripts/setup_env.sh
python=.venv/bin/python
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" TOKENIZERS_PARALLELISM=false
source scripts/mini/precision.sh

step "scenes, codes and text states"
$python -m scripts.mini.make_dataset --output_dir "$DATA" --num_train "$NUM_TRAIN" --num_val "$NUM_VAL"
$python -m scripts.cache_latents --coco_root "$DATA" --coco_split train2017 --cached_path "$CACHE/train2017" \
    --vae_path $VQ --clip_path $CLIP --img_size 64 --device cpu --num_workers 0

runs=()
for name in $VARIANTS; do
    runs+=("$name=$OUT/$name")
    if [ -e "$OUT/$name/trained" ]; then
        step "$name: trained already"
        continue
    fi
    step "$name: $STEPS steps"
    # shellcheck disable=SC2046  # flags are words
    $python main_mar.py --config configs/mini_discrete.yaml --output_dir "$OUT/$name" --coco_root "$DATA" \
        --cached_path "$CACHE/train2017" --batch_size "$BATCH" --epochs "$EPOCHS" --max_steps "$STEPS" --lr "$LR" \
        --keep_every "$KEEP_EVERY" --no-online_eval --device cpu --num_threads "$OMP_NUM_THREADS" \
        --precision "$PRECISION" $(variant_flags "$name")
    touch "$OUT/$name/trained"
done

step "norms"
$python -m scripts.mini.norm_growth --runs "${runs[@]}" --vae_path $VQ --clip_path $CLIP --coco_root "$DATA" \
    --num_images "$IMAGES" --num_threads "$OMP_NUM_THREADS" --output_dir "$OUT"
