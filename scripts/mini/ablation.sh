#!/usr/bin/env bash
# What each part of StructMAR is worth in the mini world: six models trained alike but for one part, then evaluated.
#   bash scripts/mini/ablation.sh            two hours: each model trains for 17 minutes and is scored in 4, one thread
#   bash scripts/mini/ablation.sh --smoke    a few steps of everything, to see that it works
# All start from the class-conditional mini MAR and train everything for STEPS optimizer steps (1000) of 48 images, with
# configs/mini_stage2.yaml's other settings, but the cosine ends with the run, the average is over about 100 steps, and
# there are no previews. IMAGES (250) held-out scenes are evaluated with each of SEEDS ("0"). Finished runs and
# evaluations are kept, interrupted ones go on. Everything goes to output/mini/ablation_<STEPS>_steps of this folder, or
# of $ABLATION_ROOT if that is set (an absolute path); data/ is looked for, or made, there too. VARIANTS="no_rope no_bias"
# does these only and makes no table, so that two such commands can share a machine before the whole one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# full               everything
# no_rope            no 2D RoPE: MAR's learned positions only
# no_bias            every image token may look at every layout token
# no_fourier         boxes enter as four numbers, not as Fourier features
# no_cross_attention the caption enters by its pooled projection alone
# text_only          boxes are never given: what is where, as far as the caption says it. Evaluated without boxes too.
read -r -a NAMES <<<"${VARIANTS:-full no_rope no_bias no_fourier no_cross_attention text_only}"
variant_flags() {
    case "$1" in
        full) ;;
        no_rope) echo "--rope_mode off" ;;
        no_bias) echo "--no-layout_bias_encoder --no-layout_bias_decoder" ;;
        no_fourier) echo "--no-layout_fourier" ;;
        no_cross_attention) echo "--cross_attn_every 0" ;;
        text_only) echo "--layout_drop_prob 1" ;;
        *) echo "unknown variant '$1'" >&2 && exit 2 ;;
    esac
}

ROOT="${ABLATION_ROOT:+$ABLATION_ROOT/}"
DATA="${ROOT}data/mini_coco" CACHE="${ROOT}data/mini_cache"
STEPS="${STEPS:-1000}" IMAGES="${IMAGES:-250}" SEEDS="${SEEDS:-0}"
NUM_TRAIN=6000 NUM_VAL=500 BATCH=48 SUFFIX="" EXTRA=()
SAMPLE=(--num_iter 64)
if [ "${1:-}" = "--smoke" ]; then
    DATA="${DATA}_smoke" CACHE="${CACHE}_smoke" SUFFIX="_smoke"
    STEPS=2 IMAGES=4 NUM_TRAIN=96 NUM_VAL=16 BATCH=24 EXTRA=(--diffusion_batch_mul 1)
    SAMPLE=(--num_iter 4 --num_sampling_steps 5 --batch_size 4 --num_resamples 20)
elif [ $# -gt 0 ]; then
    echo "usage: [STEPS=1000] [IMAGES=250] [SEEDS=0] bash scripts/mini/ablation.sh [--smoke]" >&2
    exit 2
fi
OUT="${ROOT}output/mini/ablation_${STEPS}_steps${SUFFIX}"
EPOCHS=$(((STEPS * BATCH + NUM_TRAIN - 1) / NUM_TRAIN))
MINI=pretrained_models/mini
FROZEN=(--vae_path $MINI/vae/kl8_mini.ckpt --clip_path $MINI/clip-text-mini)
step() { printf '\n== %s\n' "$*"; }

bash scripts/setup_env.sh
python=.venv/bin/python
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" TOKENIZERS_PARALLELISM=false
source scripts/mini/precision.sh
RUN=(--device cpu --num_threads "$OMP_NUM_THREADS" --precision "$PRECISION")

step "scenes, latents and text states"
$python -m scripts.mini.make_dataset --output_dir "$DATA" --num_train "$NUM_TRAIN" --num_val "$NUM_VAL"
$python -m scripts.cache_latents --coco_root "$DATA" --coco_split train2017 --cached_path "$CACHE/train2017" \
    "${FROZEN[@]}" --img_size 64 --device cpu --num_workers 0

for name in "${NAMES[@]}"; do
    read -r -a flags <<<"$(variant_flags "$name")"
    if [ -e "$OUT/$name/trained" ]; then
        step "$name: trained already"
    else
        step "$name: $STEPS steps"
        $python main_mar.py --config configs/mini_stage2.yaml --output_dir "$OUT/$name" --coco_root "$DATA" \
            --cached_path "$CACHE/train2017" --resume $MINI/mar_mini.safetensors --train_mode full \
            --batch_size "$BATCH" --epochs "$EPOCHS" --max_steps "$STEPS" --ema_rate 0.99 --no-online_eval "${RUN[@]}" \
            ${EXTRA[@]+"${EXTRA[@]}"} ${flags[@]+"${flags[@]}"}
        touch "$OUT/$name/trained"
    fi
done

for name in "${NAMES[@]}"; do
    evaluation="$OUT/$name/evaluation"
    if [ -e "$evaluation/results.json" ]; then
        step "$name: evaluated already"
        continue
    fi
    step "$name: $IMAGES images"
    layout=()
    if [ "$name" = text_only ]; then layout=(--without_layout); fi
    # shellcheck disable=SC2086  # SEEDS is a list
    $python -m scripts.evaluate_layout --config configs/mini_eval.yaml --coco_root "$DATA" --name "$name" \
        --resume "$OUT/$name/checkpoint-last.pth" --output_dir "$evaluation" --max_images "$IMAGES" --seeds $SEEDS \
        "${RUN[@]}" ${SAMPLE[@]+"${SAMPLE[@]}"} ${layout[@]+"${layout[@]}"}
done

if [ -n "${VARIANTS:-}" ]; then exit; fi
step "table"
$python -m scripts.mini.ablation_table --runs "$OUT" --output "$OUT/table.md"
