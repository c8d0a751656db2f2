#!/usr/bin/env bash
# Continuous or discrete tokens? Both heads on both trunks, trained alike in the mini world, then scored and timed alike.
#   bash scripts/mini/families.sh                              five trainings (hours on one thread), then the table
#   bash scripts/mini/families.sh --detector yolox_nano.onnx   a detector from elsewhere judges too
#   bash scripts/mini/families.sh --smoke                      a few steps of everything, to see that it works
# Every model trains all its parts from scratch for STEPS optimizer steps (3000) of 48 images, the same scenes in the same
# order, with the same learning rate; the cosine ends with the run. All have 64 tokens in the trunk and 8 blocks; where
# the head is discrete, a token stands for 2 x 2 codes. IMAGES (250) held-out scenes are drawn in each number of
# ITERATIONS ("8 16 32 64") and judged by a detector that was never a reward. Guidance was chosen on other scenes
# (GUIDANCE says which). NAMES picks models, then without the table. Finished runs and evaluations are kept, interrupted
# ones go on. Everything goes to output/mini/families_<STEPS>_steps of this folder, or of $FAMILIES_ROOT if that is set
# (an absolute path); data/ is looked for, or made, there too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

MINI=pretrained_models/mini
KL=$MINI/vae/kl8_mini.ckpt VQ=$MINI/vq/vq4_mini.pt
CODES="--head discrete --codebook_size 1024 --vae_stride 4 --patch_size 2 --code_dim 128"
model_flags() { # trunk_head, MAR's blocks; maskgil: LLaMA's blocks, as many parameters as the continuous models
    case "$1" in
        mae_diffusion) echo "--model mar_mini --mask_ratio_min 0.3" ;;
        single_diffusion) echo "--model mar_mini --mask_ratio_min 0.3 --trunk single" ;;
        mae_discrete) echo "--model mar_mini $CODES" ;;
        single_discrete) echo "--model mar_mini --trunk single $CODES" ;;
        maskgil) echo "--model maskgil_mini --proj_dropout 0" ;;
        *) echo "unknown model $1 in NAMES; known are $ALL" >&2; return 2 ;;
    esac
}
GUIDANCE="--cfg_text 6 --cfg_layout 4 --cfg_schedule constant"
sampling_flags() {
    case "$1" in
        *_diffusion) echo "$GUIDANCE --temperature 0.9 --num_sampling_steps 25 --clip_x0 5" ;;
        *) echo "--cfg_text 3 --cfg_layout 3 --cfg_schedule constant" ;;
    esac
}
usage() {
    echo "usage: [STEPS=3000] [IMAGES=250] [ITERATIONS='8 16 32 64'] [NAMES='$ALL']" \
        "bash scripts/mini/families.sh [--detector FILE] [--smoke]" >&2
    exit 2
}

ALL="mae_diffusion single_diffusion mae_discrete single_discrete maskgil"
ROOT="${FAMILIES_ROOT:+$FAMILIES_ROOT/}"
DATA="${ROOT}data/mini_coco" CACHE="${ROOT}data/mini_cache"
STEPS="${STEPS:-3000}" IMAGES="${IMAGES:-250}"
read -r -a COUNTS <<<"${ITERATIONS:-8 16 32 64}"
read -r -a MODELS <<<"${NAMES:-$ALL}"
NUM_TRAIN=6000 NUM_VAL=500 BATCH=48 SUFFIX="" SCORE=() TIME=() YOLOX=""
while [ $# -gt 0 ]; do
    case "$1" in
        --smoke)
            DATA="${DATA}_smoke" CACHE="${CACHE}_smoke" SUFFIX="_smoke" COUNTS=(2 4)
            STEPS=2 IMAGES=4 NUM_TRAIN=96 NUM_VAL=16 BATCH=24
            SCORE=(--batch_size 4 --num_resamples 20)
            TIME=(--num_images 2 --repeats 1)
            ;;
        --detector)
            [ $# -gt 1 ] || usage
            YOLOX="$2"
            shift
            ;;
        *) usage ;;
    esac
    shift
done
for name in "${MODELS[@]}"; do model_flags "$name" >/dev/null; done
OUT="${ROOT}output/mini/families_${STEPS}_steps${SUFFIX}"
EPOCHS=$(((STEPS * BATCH + NUM_TRAIN - 1) / NUM_TRAIN))
CLIP=$MINI/clip-text-mini
step() { printf '\n== %s\n' "$*"; }

bash scripts/setup_env.sh
python=.venv/bin/python
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" TOKENIZERS_PARALLELISM=false
source scripts/mini/precision.sh
RUN=(--device cpu --num_threads "$OMP_NUM_THREADS" --precision "$PRECISION")

step "scenes; latents, codes and text states"
$python -m scripts.mini.make_dataset --output_dir "$DATA" --num_train "$NUM_TRAIN" --num_val "$NUM_VAL"
cached_by() { if [ "$1" = "$KL" ]; then echo "$CACHE/train2017"; else echo "${CACHE}_vq/train2017"; fi; }
tokenizer_of() { case "$1" in *_diffusion) echo $KL ;; *) echo $VQ ;; esac; }
for tokenizer in $KL $VQ; do
    $python -m scripts.cache_latents --coco_root "$DATA" --coco_split train2017 --cached_path "$(cached_by $tokenizer)" \
        --vae_path $tokenizer --clip_path $CLIP --img_size 64 --device cpu --num_workers 0
done

for name in "${MODELS[@]}"; do
    tokenizer=$(tokenizer_of "$name")
    if [ -e "$OUT/$name/trained" ]; then
        step "$name: trained already"
        continue
    fi
    step "$name: $STEPS steps"
    # shellcheck disable=SC2046  # flags are words
    $python main_mar.py --config configs/mini_discrete.yaml --output_dir "$OUT/$name" --coco_root "$DATA" \
        --cached_path "$(cached_by "$tokenizer")" --vae_path "$tokenizer" --batch_size "$BATCH" --epochs "$EPOCHS" \
        --max_steps "$STEPS" --no-online_eval "${RUN[@]}" $(model_flags "$name")
    touch "$OUT/$name/trained"
done

evaluate() { # NAME ITERATIONS DETECTOR FOLDER FLAGS...
    if [ -e "$4/results.json" ]; then return; fi
    # shellcheck disable=SC2046
    $python -m scripts.evaluate_layout --config configs/mini_eval.yaml --coco_root "$DATA" --name "${1}_$2" \
        --resume "$OUT/$1/checkpoint-last.pth" --vae_path "$(tokenizer_of "$1")" --output_dir "$4" --detector "$3" \
        --max_images "$IMAGES" --num_iter "$2" --bounds_dir "$OUT/bounds" $(sampling_flags "$1") "${RUN[@]}" \
        ${SCORE[@]+"${SCORE[@]}"} "${@:5}"
}
for name in "${MODELS[@]}"; do
    for count in "${COUNTS[@]}"; do
        step "$name: $IMAGES images of $count iterations"
        judged="$OUT/$name/$count/judge"
        evaluate "$name" "$count" $MINI/fasterrcnn_mini_judge.pth "$judged" --features $MINI/fasterrcnn_mini.pth
        $python -m scripts.mini.colour_accuracy --coco_root "$DATA" --max_images "$IMAGES" \
            --images "$judged/images/seed_0" --output "$OUT/$name/$count/colour.json"
        if [ -n "$YOLOX" ]; then evaluate "$name" "$count" "$YOLOX" "$OUT/$name/$count/yolox" --skip_unknown; fi
    done
done

if [ -n "${NAMES:-}" ]; then exit; fi
step "times, then the table"
models=() judges=(judge)
if [ -n "$YOLOX" ]; then judges+=(yolox); fi
for name in "${MODELS[@]}"; do models+=("$name=$(tokenizer_of "$name")"); done
$python -m scripts.mini.families_time --runs "$OUT" --models "${models[@]}" --clip_path $CLIP --coco_root "$DATA" \
    --iterations "${COUNTS[@]}" --num_threads "$OMP_NUM_THREADS" --precision "$PRECISION" --output "$OUT/times.json" \
    ${TIME[@]+"${TIME[@]}"}
$python -m scripts.mini.families_table --runs "$OUT" --names "${MODELS[@]}" --iterations "${COUNTS[@]}" \
    --detectors "${judges[@]}" --output "$OUT/table.md"
