#!/usr/bin/env bash
# Everything that stage 3 can do in the mini world, from the committed stage-2 weights to tables, curves and gallery:
#   stage 2 -> guidance distilled -> reward gradient -> one-step head
#                                 -> GRPO, NFT, best of a group (rollouts of the distilled model)
#   bash scripts/mini/stage3.sh                              two trainings of each, hours of one core
#   bash scripts/mini/stage3.sh --detector yolox_nano.onnx   a detector from elsewhere judges too
#   bash scripts/mini/stage3.sh --smoke                      a few steps of everything, to see that it works
# Each is trained once for each of TRAININGS ("0 1", seeds); every training goes its own way from stage 2 on. What has
# rollouts makes UPDATES (50) updates of 32. IMAGES (300) held-out layouts are drawn with each of SEEDS ("0 1 2") by the
# sampling that the weights name, and judged by the reward detector, by another one that was never a reward, and by
# --detector. NAMES picks runs: each needs the one that it starts from. Finished runs and evaluations are kept,
# interrupted ones go on. Everything goes to output/mini/stage3_runs of this folder, or of $RL_ROOT if that is set (an
# absolute path); data/ is looked for, or made, there too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

ALL="distill reward_gradient few_step grpo nft best_of"
start_of() { # whose weights a run begins with
    case "$1" in
        distill) echo stage2 ;;
        reward_gradient | grpo | nft | best_of) echo distill ;;
        few_step) echo reward_gradient ;;
        *) echo "unknown run $1 in NAMES; known are $ALL" >&2; return 2 ;;
    esac
}
program_of() { # everything but where it reads and writes
    case "$1" in
        distill) echo "main_mar.py --config configs/mini_distill.yaml" ;;
        few_step) echo "main_mar.py --config configs/mini_few_step.yaml" ;;
        reward_gradient) echo "main_rl.py --config configs/mini_stage3_gradient.yaml" ;;
        *) echo "main_rl.py --config configs/mini_stage3.yaml --max_rl_steps $UPDATES --objective $1 $(tuned_for "$1")" ;;
    esac
}
tuned_for() { # temperature: as the distilled weights name it; credit and timesteps: where updates are least noise
    case "$1" in
        grpo) echo "--temperature 0.6 --lr 1e-5 --credit region --rl_t_min 600" ;;
        nft) echo "--temperature 0.6 --lr 1e-5 --credit region --rl_t_min 600 --inner_epochs 1" ;;
        best_of) echo "--temperature 0.6 --lr 1e-5 --inner_epochs 1" ;;
    esac
}
rows_of() { # what is drawn with a run's weights
    case "$1" in
        few_step) echo "few_step_1 few_step_2 few_step_4" ;;
        *) echo "$1" ;;
    esac
}
sampling_of() {
    case "$1" in
        stage2_cool) echo "--temperature 0.6" ;; # as the distilled weights name it
        few_step_*) echo "--head_evals ${1#few_step_}" ;;
    esac
}
usage() {
    echo "usage: [TRAININGS='0 1'] [UPDATES=50] [IMAGES=300] [SEEDS='0 1 2'] [NAMES='$ALL']" \
        "bash scripts/mini/stage3.sh [--detector FILE] [--smoke]" >&2
    exit 2
}

ROOT="${RL_ROOT:+$RL_ROOT/}"
DATA="${ROOT}data/mini_coco" CACHE="${ROOT}data/mini_cache"
TRAININGS="${TRAININGS:-0 1}" UPDATES="${UPDATES:-50}" IMAGES="${IMAGES:-300}" SEEDS="${SEEDS:-0 1 2}"
read -r -a NAMES <<<"${NAMES:-$ALL}"
NUM_TRAIN=6000 NUM_VAL=500 SUFFIX="" SFT=() RL=() SCORE=() YOLOX=""
while [ $# -gt 0 ]; do
    case "$1" in
        --smoke)
            DATA="${DATA}_smoke" CACHE="${CACHE}_smoke" SUFFIX="_smoke"
            UPDATES=2 IMAGES=4 SEEDS="0" NUM_TRAIN=96 NUM_VAL=16
            SFT=(--max_steps 2 --batch_size 8 --eval_images 4 --num_preview 2)
            RL=(--max_rl_steps 2 --batch_size 2 --eval_images 4 --eval_freq 1 --num_iter 4 --num_preview 2)
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
OUT="${ROOT}output/mini/stage3_runs${SUFFIX}"
MINI=pretrained_models/mini
STAGE_2=$MINI/structmar_mini_stage2.safetensors
FROZEN=(--vae_path $MINI/vae/kl8_mini.ckpt --clip_path $MINI/clip-text-mini)
DETECTORS=(judge reward)
if [ -n "$YOLOX" ]; then DETECTORS+=(yolox); fi
weights_of() { if [ "$1" = stage2 ]; then echo $STAGE_2; else echo "$OUT/runs/$1/$2/weights.safetensors"; fi; }
step() { printf '\n== %s\n' "$*"; }

for name in "${NAMES[@]}"; do start_of "$name" >/dev/null; done
bash scripts/setup_env.sh
python=.venv/bin/python
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" TOKENIZERS_PARALLELISM=false
source scripts/mini/precision.sh
RUN=(--device cpu --num_threads "$OMP_NUM_THREADS" --precision "$PRECISION")

step "scenes, latents and text states"
$python -m scripts.mini.make_dataset --output_dir "$DATA" --num_train "$NUM_TRAIN" --num_val "$NUM_VAL"
$python -m scripts.cache_latents --coco_root "$DATA" --coco_split train2017 --cached_path "$CACHE/train2017" \
    "${FROZEN[@]}" --img_size 64 --device cpu --num_workers 0

train() { # NAME TRAINING
    local folder="$OUT/runs/$1/$2" program small=()
    read -r -a program <<<"$(program_of "$1")"
    if [ "${program[0]}" = main_mar.py ]; then small=(${SFT[@]+"${SFT[@]}"}); else small=(${RL[@]+"${RL[@]}"}); fi
    $python "${program[@]}" --output_dir "$folder" --resume "$(weights_of "$(start_of "$1")" "$2")" --seed "$2" \
        --coco_root "$DATA" --cached_path "$CACHE/train2017" "${RUN[@]}" ${small[@]+"${small[@]}"}
    $python -m scripts.export_weights --resume "$folder/checkpoint-last.pth" --output "$folder/weights.safetensors"
}

evaluate() { # ROW TRAINING WEIGHTS: images once, then every detector on them
    local folder="$OUT/scores/$1/$2" detector file more seed pictures=()
    for detector in "${DETECTORS[@]}"; do
        if [ -e "$folder/$detector/results.json" ]; then continue; fi
        step "$1, training $2: $IMAGES layouts, by the $detector detector"
        case "$detector" in
            judge) file=$MINI/fasterrcnn_mini_judge.pth ;;
            reward) file=$MINI/fasterrcnn_mini.pth ;;
            *) file="$YOLOX" ;;
        esac
        more=()
        if [ "$detector" != judge ]; then # the same pictures: nothing is generated
            mkdir -p "$folder/$detector"
            ln -sfn ../judge/images "$folder/$detector/images"
            cp "$folder/judge/generation.json" "$folder/$detector/generation.json"
            more=(--rescore)
        fi
        # shellcheck disable=SC2046,SC2086  # flags and SEEDS are words
        $python -m scripts.evaluate_layout --config configs/mini_eval.yaml --coco_root "$DATA" --name "$1" \
            --resume "$3" --detector "$file" --output_dir "$folder/$detector" --max_images "$IMAGES" --seeds $SEEDS \
            --reward_detector $MINI/fasterrcnn_mini.pth --bounds_dir "$OUT/bounds" "${RUN[@]}" $(sampling_of "$1") \
            ${SCORE[@]+"${SCORE[@]}"} ${more[@]+"${more[@]}"}
    done
    if [ ! -e "$folder/colour.json" ]; then
        for seed in $SEEDS; do pictures+=("$folder/judge/images/seed_$seed"); done
        $python -m scripts.mini.colour_accuracy --coco_root "$DATA" --max_images "$IMAGES" \
            --images "${pictures[@]}" --output "$folder/colour.json"
    fi
}

for training in $TRAININGS; do
    for name in "${NAMES[@]}"; do
        if [ -e "$OUT/runs/$name/$training/weights.safetensors" ]; then
            step "$name, training $training: trained already"
        else
            step "$name, training $training"
            train "$name" "$training"
        fi
    done
done
rows=(stage2 stage2_cool) curves=()
for row in "${rows[@]}"; do evaluate "$row" 0 $STAGE_2; done
for name in "${NAMES[@]}"; do
    if [[ "$(program_of "$name")" = main_rl.py* ]]; then curves=(--curves "$OUT/curves.png"); fi
    for row in $(rows_of "$name"); do
        rows+=("$row")
        for training in $TRAININGS; do evaluate "$row" "$training" "$(weights_of "$name" "$training")"; done
    done
done

step "tables, curves and gallery"
$python -m scripts.mini.stage3_table --runs "$OUT" --rows "${rows[@]}" --detectors "${DETECTORS[@]}" \
    --stage2 $STAGE_2 --output "$OUT/table.md" --gallery "$OUT/gallery.png" ${curves[@]+"${curves[@]}"}
