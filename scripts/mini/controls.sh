#!/usr/bin/env bash
# What does each control of the layout do to pictures, and what does it cost? The committed weights of both heads.
#   bash scripts/mini/controls.sh           the table: about an hour of one thread for 250 scenes
#   bash scripts/mini/controls.sh --smoke   a few pictures of everything, to see that it works
# IMAGES (250) held-out scenes are drawn under each control with the options that the weights name, and judged by a
# detector that was never a reward; then all are timed in turns. NAMES picks controls, in any order; the first is what
# the others are compared with. Finished evaluations are kept, interrupted ones go on. Everything goes to
# output/mini/controls_<IMAGES> of this folder, or of $CONTROLS_ROOT if that is set (an absolute path); data/ is looked
# for, or made, there too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

MINI=pretrained_models/mini
flags_of() { # one flag or value a line
    case "$1" in
        plain) ;;
        caption_only) printf '%s\n' --drop_grounding_tokens ;;
        fading) printf '%s\n' --layout_schedule 0.3 0.2 ;;
        half) printf '%s\n' --layout_scale 0.5 ;;
        double) printf '%s\n' --layout_scale 2 ;;
        auto) printf '%s\n' --mask_threshold 0.5 --start_step 3 ;;
        auto_only) printf '%s\n' --drop_grounding_tokens --mask_threshold 0.5 --start_step 3 ;;
        negative) printf '%s\n' --negative_prompt "on the grass" ;;
        *) echo "unknown control $1 in NAMES; known are $ALL" >&2; return 2 ;;
    esac
}
vae_of() { case "$1" in maskgil*) echo $MINI/vq/vq4_mini.pt ;; *) echo $MINI/vae/kl8_mini.ckpt ;; esac; }
usage() {
    echo "usage: [IMAGES=250] [NAMES='$ALL'] bash scripts/mini/controls.sh [--smoke]" >&2
    exit 2
}

ALL="plain caption_only fading half double auto auto_only negative"
MODELS=(structmar_mini_stage2 maskgil_mini_stage2)
ROOT="${CONTROLS_ROOT:+$CONTROLS_ROOT/}"
DATA="${ROOT}data/mini_coco"
IMAGES="${IMAGES:-250}"
read -r -a CONTROLS <<<"${NAMES:-$ALL}"
NUM_TRAIN=6000 NUM_VAL=500 SUFFIX="" SCORE=() TIME=()
while [ $# -gt 0 ]; do
    case "$1" in
        --smoke)
            DATA="${DATA}_smoke" SUFFIX="_smoke" IMAGES=4 NUM_TRAIN=96 NUM_VAL=16
            SCORE=(--batch_size 4 --num_resamples 20)
            TIME=(--num_images 2 --repeats 1)
            ;;
        *) usage ;;
    esac
    shift
done
for name in "${CONTROLS[@]}"; do flags_of "$name" >/dev/null; done
OUT="${ROOT}output/mini/controls_${IMAGES}${SUFFIX}"
step() { printf '\n== %s\n' "$*"; }

bash scripts/setup_env.sh
python=.venv/bin/python
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" TOKENIZERS_PARALLELISM=false
source scripts/mini/precision.sh
RUN=(--num_threads "$OMP_NUM_THREADS" --precision "$PRECISION")

step "scenes"
$python -m scripts.mini.make_dataset --output_dir "$DATA" --num_train "$NUM_TRAIN" --num_val "$NUM_VAL"

for model in "${MODELS[@]}"; do
    for name in "${CONTROLS[@]}"; do
        step "$model, $name: $IMAGES images"
        mapfile -t flags < <(flags_of "$name")
        folder="$OUT/$model/$name"
        if [ ! -e "$folder/results.json" ]; then
            $python -m scripts.evaluate_layout --config configs/mini_eval.yaml --coco_root "$DATA" --name "$name" \
                --resume "$MINI/$model.safetensors" --vae_path "$(vae_of "$model")" --output_dir "$folder" \
                --detector $MINI/fasterrcnn_mini_judge.pth --max_images "$IMAGES" --bounds_dir "$OUT/bounds" \
                "${RUN[@]}" ${SCORE[@]+"${SCORE[@]}"} ${flags[@]+"${flags[@]}"}
        fi
        if [ ! -e "$folder/colour.json" ]; then
            $python -m scripts.mini.colour_accuracy --coco_root "$DATA" --max_images "$IMAGES" \
                --images "$folder/images/seed_0" --output "$folder/colour.json"
        fi
    done
done

step "times, then the table"
models=()
for model in "${MODELS[@]}"; do models+=("$model=$(vae_of "$model")"); done
$python -m scripts.mini.controls_table --runs "$OUT" --models "${models[@]}" --controls "${CONTROLS[@]}" \
    --coco_root "$DATA" "${RUN[@]}" --output "$OUT/table.md" ${TIME[@]+"${TIME[@]}"}
