#!/usr/bin/env bash
# What reward fine-tuning changes in the mini world: GRPO with either estimator, without the KL term, with guided
# rollouts, and the paper's released surrogate, from the same stage-2 weights and as many rollouts, before and after.
#   bash scripts/mini/rl_comparison.sh                              its runs, one by one, took about four hours of a busy core
#   bash scripts/mini/rl_comparison.sh --detector yolox_nano.onnx   a third detector judges too
#   bash scripts/mini/rl_comparison.sh --smoke                      a few updates of everything, to see that it works
# Every run makes UPDATES (200) updates with configs/mini_stage3.yaml's settings; trajectory scores as many masks and
# steps as cost what elbo's masks and draws cost (0.4 TFLOP an update). IMAGES (300) held-out layouts are drawn
# with each of SEEDS ("0 1 2"), once as the rollouts are (no guidance) and once with configs/mini_eval.yaml's guidance,
# and judged by the reward detector, by another one that was trained apart, and by --detector. NAMES picks the runs.
# Finished runs and evaluations are kept, interrupted ones go on. Everything goes to output/mini/rl_<UPDATES>_updates of
# this folder, or of $RL_ROOT if that is set (an absolute path); data/ is looked for, or made, there too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

run_flags() {
    case "$1" in
        elbo) echo "--rl_estimator elbo" ;;
        trajectory) echo "--rl_estimator trajectory --rl_masks 4 --rl_draws 8 --lr 1e-5" ;; # loses at elbo's 3e-5
        no_kl | paper) echo "--rl_estimator elbo --kl_coef 0" ;;
        guided) echo "--rl_estimator elbo --cfg_text 6 --cfg_layout 4 --cfg_schedule constant --lr 1e-5" ;;
        *) echo "unknown run $1 in NAMES; known are elbo trajectory no_kl paper guided" >&2; return 2 ;;
    esac
}
usage() {
    echo "usage: [UPDATES=200] [IMAGES=300] [SEEDS='0 1 2'] [NAMES='elbo trajectory no_kl paper guided']" \
        "bash scripts/mini/rl_comparison.sh [--detector FILE] [--smoke]" >&2
    exit 2
}

ROOT="${RL_ROOT:+$RL_ROOT/}"
DATA="${ROOT}data/mini_coco" CACHE="${ROOT}data/mini_cache"
UPDATES="${UPDATES:-200}" IMAGES="${IMAGES:-300}" SEEDS="${SEEDS:-0 1 2}"
read -r -a NAMES <<<"${NAMES:-elbo trajectory no_kl paper guided}"
NUM_TRAIN=6000 NUM_VAL=500 SUFFIX="" EXTRA=() YOLOX=""
SAMPLING=(--num_iter 16 --num_sampling_steps 25 --cfg_text 1 --cfg_layout 1 --temperature 1)
GUIDED=(--num_iter 64) # the rest is what the weights name
SCORE=()
while [ $# -gt 0 ]; do
    case "$1" in
        --smoke)
            DATA="${DATA}_smoke" CACHE="${CACHE}_smoke" SUFFIX="_smoke"
            UPDATES=2 IMAGES=4 NUM_TRAIN=96 NUM_VAL=16
            EXTRA=(--batch_size 2 --group_size 2 --eval_images 4 --eval_freq 1)
            SAMPLING=(--num_iter 4 --num_sampling_steps 12 --cfg_text 1 --cfg_layout 1 --temperature 1)
            GUIDED=(--num_iter 4 --num_sampling_steps 5)
            SCORE=(--batch_size 4 --num_resamples 20)
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
OUT="${ROOT}output/mini/rl_${UPDATES}_updates${SUFFIX}"
MINI=pretrained_models/mini
STAGE_2=$MINI/structmar_mini_stage2.safetensors
FROZEN=(--vae_path $MINI/vae/kl8_mini.ckpt --clip_path $MINI/clip-text-mini)
DETECTORS=(reward judge)
if [ -n "$YOLOX" ]; then DETECTORS+=(yolox); fi
detector_file() {
    case "$1" in
        reward) echo $MINI/fasterrcnn_mini.pth ;;
        judge) echo $MINI/fasterrcnn_mini_judge.pth ;;
        yolox) echo "$YOLOX" ;;
    esac
}
step() { printf '\n== %s\n' "$*"; }

for name in "${NAMES[@]}"; do run_flags "$name" >/dev/null; done
bash scripts/setup_env.sh
python=.venv/bin/python
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" TOKENIZERS_PARALLELISM=false
source scripts/mini/precision.sh
RUN=(--device cpu --num_threads "$OMP_NUM_THREADS" --precision "$PRECISION")

step "scenes, latents and text states"
$python -m scripts.mini.make_dataset --output_dir "$DATA" --num_train "$NUM_TRAIN" --num_val "$NUM_VAL"
$python -m scripts.cache_latents --coco_root "$DATA" --coco_split train2017 --cached_path "$CACHE/train2017" \
    "${FROZEN[@]}" --img_size 64 --device cpu --num_workers 0

train() { # NAME
    local main=(main_rl.py)
    if [ "$1" = paper ]; then main=(-m scripts.mini.paper_surrogate); fi
    read -r -a flags <<<"$(run_flags "$1")"
    $python "${main[@]}" --config configs/mini_stage3.yaml --output_dir "$OUT/$1" --coco_root "$DATA" \
        --cached_path "$CACHE/train2017" --resume $STAGE_2 --max_rl_steps "$UPDATES" "${SAMPLING[@]}" "${RUN[@]}" \
        ${EXTRA[@]+"${EXTRA[@]}"} "${flags[@]}"
    touch "$OUT/$1/trained"
}

evaluate() { # NAME WEIGHTS SAMPLING FLAGS...: images once, then every detector on them
    local name="$1" weights="$2" folder="$OUT/$1/$3" detector more
    shift 3
    for detector in "${DETECTORS[@]}"; do
        if [ -e "$folder/$detector/results.json" ]; then continue; fi
        step "$name: $IMAGES layouts, ${folder##*/}, by the $detector detector"
        more=()
        if [ "$detector" != reward ]; then # the same pictures: nothing is generated
            mkdir -p "$folder/$detector"
            ln -sfn ../reward/images "$folder/$detector/images"
            cp "$folder/reward/generation.json" "$folder/$detector/generation.json"
            more=(--rescore)
        fi
        if [ "$name" != stage2 ]; then more+=(--no-real_bound --no-vae_bound); fi
        # shellcheck disable=SC2086  # SEEDS is a list
        $python -m scripts.evaluate_layout --config configs/mini_eval.yaml --coco_root "$DATA" --name "$name" \
            --resume "$weights" --detector "$(detector_file "$detector")" --output_dir "$folder/$detector" \
            --reward_detector $MINI/fasterrcnn_mini.pth --max_images "$IMAGES" --seeds $SEEDS "${RUN[@]}" \
            "$@" ${SCORE[@]+"${SCORE[@]}"} ${more[@]+"${more[@]}"}
    done
    if [ ! -e "$folder/colour.json" ]; then
        local pictures=()
        for seed in $SEEDS; do pictures+=("$folder/reward/images/seed_$seed"); done
        $python -m scripts.mini.colour_accuracy --coco_root "$DATA" --max_images "$IMAGES" \
            --images "${pictures[@]}" --output "$folder/colour.json"
    fi
}

for name in "${NAMES[@]}"; do
    if [ -e "$OUT/$name/trained" ]; then step "$name: trained already"; else
        step "$name: $UPDATES updates"
        train "$name"
    fi
done
for name in stage2 "${NAMES[@]}"; do
    weights=$STAGE_2
    if [ "$name" != stage2 ]; then weights="$OUT/$name/checkpoint-last.pth"; fi
    evaluate "$name" "$weights" rollout "${SAMPLING[@]}"
    evaluate "$name" "$weights" guided ${GUIDED[@]+"${GUIDED[@]}"}
done

step "tables and curves"
$python -m scripts.mini.rl_table --runs "$OUT" --names stage2 "${NAMES[@]}" --detectors "${DETECTORS[@]}" \
    --output "$OUT/table.md" --curves "$OUT/curves.png"
