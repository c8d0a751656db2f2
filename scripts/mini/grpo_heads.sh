#!/usr/bin/env bash
# Which head gains more by GRPO, where rollouts cost the same? Stage 3 from the committed weights of both heads in the
# mini world, each with rollouts as its images are sampled, then both scored before and after.
#   bash scripts/mini/grpo_heads.sh                              two runs, then a table for each head
#   bash scripts/mini/grpo_heads.sh --detector yolox_nano.onnx   a detector from elsewhere judges too
#   bash scripts/mini/grpo_heads.sh --smoke                      a few updates of everything, to see that it works
# The continuous head makes UPDATES (50) updates by ELBO differences of guided rollouts in 16 iterations of 25 steps
# (0.76 TFLOP of rollout an update), the discrete one three times as many by exact log-probabilities of 8 iterations
# (0.26). Both see 32 images an update and the same learning rate. IMAGES (300) held-out layouts are drawn with each of
# SEEDS ("0 1 2") by the sampling that the weights name, and judged by a detector that was never a reward. Finished runs
# and evaluations are kept, interrupted ones go on. Everything goes to output/mini/grpo_heads_<UPDATES>_updates of this
# folder, or of $RL_ROOT if that is set (an absolute path); data/ is looked for, or made, there too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

usage() {
    echo "usage: [UPDATES=50] [IMAGES=300] [SEEDS='0 1 2'] bash scripts/mini/grpo_heads.sh [--detector FILE] [--smoke]" >&2
    exit 2
}

MINI=pretrained_models/mini
HEADS="continuous discrete"
weights_of() { case "$1" in continuous) echo $MINI/structmar_mini_stage2.safetensors ;; *) echo $MINI/maskgil_mini_stage2.safetensors ;; esac; }
tokenizer_of() { case "$1" in continuous) echo $MINI/vae/kl8_mini.ckpt ;; *) echo $MINI/vq/vq4_mini.pt ;; esac; }
cached_by() { case "$1" in continuous) echo "$CACHE/train2017" ;; *) echo "${CACHE}_vq/train2017" ;; esac; }
run_flags() {
    case "$1" in
        continuous) echo "--config configs/mini_stage3.yaml --cfg_text 6 --cfg_layout 4 --cfg_schedule constant" \
            "--temperature 0.9 --lr 1e-5 --max_rl_steps $UPDATES" ;;
        *) echo "--config configs/mini_discrete_stage3.yaml --max_rl_steps $((3 * UPDATES))" ;;
    esac
}

ROOT="${RL_ROOT:+$RL_ROOT/}"
DATA="${ROOT}data/mini_coco" CACHE="${ROOT}data/mini_cache"
UPDATES="${UPDATES:-50}" IMAGES="${IMAGES:-300}" SEEDS="${SEEDS:-0 1 2}"
NUM_TRAIN=6000 NUM_VAL=500 SUFFIX="" EXTRA=() SCORE=() YOLOX=""
while [ $# -gt 0 ]; do
    case "$1" in
        --smoke)
            DATA="${DATA}_smoke" CACHE="${CACHE}_smoke" SUFFIX="_smoke"
            UPDATES=1 IMAGES=4 SEEDS="0" NUM_TRAIN=96 NUM_VAL=16
            EXTRA=(--batch_size 2 --group_size 2 --eval_images 4 --num_iter 4)
            SCORE=(--batch_size 4 --num_resamples 20 --num_iter 4)
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
OUT="${ROOT}output/mini/grpo_heads_${UPDATES}_updates${SUFFIX}"
CLIP=$MINI/clip-text-mini
JUDGES="judge"
if [ -n "$YOLOX" ]; then JUDGES="judge yolox"; fi
step() { printf '\n== %s\n' "$*"; }

bash scripts/setup_env.sh
python=.venv/bin/python
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" TOKENIZERS_PARALLELISM=false
source scripts/mini/precision.sh
RUN=(--device cpu --num_threads "$OMP_NUM_THREADS" --precision "$PRECISION")

step "scenes; latents, codes and text states"
$python -m scripts.mini.make_dataset --output_dir "$DATA" --num_train "$NUM_TRAIN" --num_val "$NUM_VAL"
for head in $HEADS; do
    $python -m scripts.cache_latents --coco_root "$DATA" --coco_split train2017 --cached_path "$(cached_by "$head")" \
        --vae_path "$(tokenizer_of "$head")" --clip_path $CLIP --img_size 64 --device cpu --num_workers 0
done

for head in $HEADS; do
    if [ -e "$OUT/$head/trained" ]; then
        step "$head: trained already"
        continue
    fi
    step "$head: stage 3"
    # shellcheck disable=SC2046  # flags are words
    $python main_rl.py $(run_flags "$head") --output_dir "$OUT/$head" --coco_root "$DATA" \
        --cached_path "$(cached_by "$head")" --resume "$(weights_of "$head")" "${RUN[@]}" ${EXTRA[@]+"${EXTRA[@]}"}
    touch "$OUT/$head/trained"
done

evaluate() { # HEAD NAME WEIGHTS: images once, then every detector on them
    local folder="$OUT/$2" judge more seed pictures=()
    for judge in $JUDGES; do
        if [ -e "$folder/$judge/results.json" ]; then continue; fi
        step "$2: $IMAGES layouts, judged by $judge"
        more=(--detector $MINI/fasterrcnn_mini_judge.pth --features $MINI/fasterrcnn_mini.pth)
        if [ "$judge" = yolox ]; then # the same pictures: nothing is generated
            mkdir -p "$folder/yolox"
            ln -sfn ../judge/images "$folder/yolox/images"
            cp "$folder/judge/generation.json" "$folder/yolox/generation.json"
            more=(--detector "$YOLOX" --skip_unknown --rescore)
        fi
        # shellcheck disable=SC2086  # SEEDS is a list
        $python -m scripts.evaluate_layout --config configs/mini_eval.yaml --coco_root "$DATA" --name "$2" \
            --resume "$3" --vae_path "$(tokenizer_of "$1")" --output_dir "$folder/$judge" --max_images "$IMAGES" \
            --seeds $SEEDS --bounds_dir "$OUT/bounds" "${RUN[@]}" ${SCORE[@]+"${SCORE[@]}"} "${more[@]}"
    done
    for seed in $SEEDS; do pictures+=("$folder/judge/images/seed_$seed"); done
    $python -m scripts.mini.colour_accuracy --coco_root "$DATA" --max_images "$IMAGES" --images "${pictures[@]}" \
        --output "$folder/colour.json"
}
for head in $HEADS; do
    evaluate "$head" "${head}_stage2" "$(weights_of "$head")"
    evaluate "$head" "${head}_stage3" "$OUT/$head/checkpoint-last.pth"
done
for head in $HEADS; do
    for judge in $JUDGES; do
        step "$head, judged by $judge"
        $python -m scripts.compare "$OUT/${head}_stage2/$judge" "$OUT/${head}_stage3/$judge" \
            --output "$OUT/${head}_$judge.md"
    done
done
