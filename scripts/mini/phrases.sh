#!/usr/bin/env bash
# What do phrases of boxes decide? Held-out scenes of the mini world, drawn with captions that name colours and with
# captions that do not, boxes told by their class, by their phrase ("large red umbrella") or by both.
#   bash scripts/mini/phrases.sh            250 images in each of seven ways, then table.md
#   bash scripts/mini/phrases.sh --smoke    a few images, to see that it works
# WEIGHTS are those with phrases, BEFORE those that they started from (drawn by class alone). Finished evaluations are
# kept, interrupted ones go on. Everything goes to output/mini/phrases_<IMAGES> of this folder, or of $PHRASES_ROOT if
# that is set (an absolute path); data/ is looked for, or made, there too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

MINI=pretrained_models/mini
ROOT="${PHRASES_ROOT:+$PHRASES_ROOT/}"
IMAGES="${IMAGES:-250}"
WEIGHTS="${WEIGHTS:-$MINI/structmar_mini_phrases.safetensors}" BEFORE="${BEFORE:-$MINI/structmar_mini_stage2.safetensors}"
SAMPLE=(--num_iter 16)
case "${1:-}" in
    "") ;;
    --smoke) IMAGES=4 SAMPLE=(--num_iter 4 --num_sampling_steps 4) ;;
    *) echo "usage: [IMAGES=250] bash scripts/mini/phrases.sh [--smoke]" >&2 && exit 2 ;;
esac
OUT="${ROOT}output/mini/phrases_${IMAGES}"
WAYS="before_named_class named_class named_phrase named_both silent_class silent_phrase silent_both"
step() { printf '\n== %s\n' "$*"; }

bash scripts/setup_env.sh
python=.venv/bin/python
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" TOKENIZERS_PARALLELISM=false
source scripts/mini/precision.sh

step "scenes, with and without colours in their captions"
$python -m scripts.mini.make_dataset --output_dir "${ROOT}data/mini_phrases_named" --num_train 1 --num_val "$IMAGES"
$python -m scripts.mini.make_dataset --output_dir "${ROOT}data/mini_phrases_silent" --num_train 1 \
    --num_val "$IMAGES" --no-colour_words
for way in $WAYS; do
    step "$way"
    captions="${way#before_}"
    data="${ROOT}data/mini_phrases_${captions%_*}" weights="$WEIGHTS"
    if [ "$captions" != "$way" ]; then weights="$BEFORE"; fi
    if [ ! -e "$OUT/$way/results.json" ]; then
        $python -m scripts.evaluate_layout --config configs/mini_eval.yaml --detector $MINI/fasterrcnn_mini_judge.pth \
            --coco_root "$data" --resume "$weights" --boxes_by "${way##*_}" --name "$way" --precision "$PRECISION" \
            --num_threads "$OMP_NUM_THREADS" --bounds_dir "$OUT/bounds" --no-vae_bound --output_dir "$OUT/$way" \
            "${SAMPLE[@]}"
    fi
    $python -m scripts.mini.colour_accuracy --coco_root "$data" --images "$OUT/$way/images/seed_0" \
        --output "$OUT/$way/colour.json"
done
step "table"
$python -m scripts.mini.phrases_table --runs "$OUT" --ways $WAYS --output "$OUT/table.md"
