#!/usr/bin/env bash
# Remakes everything in pretrained_models/mini/ from seeds: scenes, VAE, VQ, text encoder, class-conditional MAR, stages 1
# and 2, detectors. About five hours on two cores; run it again after an interruption and it goes on where it stopped.
# Finished files are kept: remove one to remake it (and those below it, which depend on it).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup_env.sh
python=.venv/bin/python MINI=pretrained_models/mini
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" TOKENIZERS_PARALLELISM=false
source scripts/mini/precision.sh
step() { printf '\n== %s\n' "$*"; }
build_if_missing() { # FILE COMMAND...
    if [ -e "$1" ]; then echo "$1 is there"; else "${@:2}"; fi
}

step "scenes"
$python -m scripts.mini.make_dataset --output_dir data/mini_coco
step "KL VAE: a first run, then a second that weighs large errors more (30 minutes)"
FIRST=output/mini/vae_first/kl8_mini.ckpt
if [ ! -e $MINI/vae/kl8_mini.ckpt ]; then
    $python -m scripts.mini.train_vae --output $FIRST --mse_weight 1 --edge_weight 0.5
    $python -m scripts.mini.train_vae --output $MINI/vae/kl8_mini.ckpt --init $FIRST --steps 2600 --warmup 50
fi
step "VQ tokenizer (9 minutes on one thread)"
build_if_missing $MINI/vq/vq4_mini.pt $python -m scripts.mini.train_vq --output $MINI/vq/vq4_mini.pt
step "CLIP text encoder (15 minutes on one thread)"
build_if_missing $MINI/clip-text-mini/config.json $python -m scripts.mini.train_clip --output $MINI/clip-text-mini
step "class-conditional MAR (12 minutes)"
build_if_missing $MINI/mar_mini.safetensors $python -m scripts.mini.pretrain_mar --precision "$PRECISION" \
    --output $MINI/mar_mini.safetensors
step "latents and text states"
$python -m scripts.cache_latents --coco_root data/mini_coco --coco_split train2017 \
    --cached_path data/mini_cache/train2017 --vae_path $MINI/vae/kl8_mini.ckpt --clip_path $MINI/clip-text-mini \
    --img_size 64 --device cpu --num_workers 0
step "stage 1, align (4 minutes)"
$python main_mar.py --config configs/mini_stage1.yaml --precision "$PRECISION"
step "stage 2, SFT, on three times as many scenes (two and a half hours)"
$python -m scripts.mini.make_dataset --output_dir data/mini_coco_18k --num_train 18000
$python -m scripts.cache_latents --coco_root data/mini_coco_18k --coco_split train2017 \
    --cached_path data/mini_cache_18k/train2017 --vae_path $MINI/vae/kl8_mini.ckpt --clip_path $MINI/clip-text-mini \
    --img_size 64 --device cpu --num_workers 0
$python main_mar.py --config configs/mini_stage2.yaml --precision "$PRECISION" --coco_root data/mini_coco_18k \
    --cached_path data/mini_cache_18k/train2017 --batch_size 64 --diffusion_batch_mul 1 --ema_rate 0.999 --epochs 37
$python -m scripts.export_weights --resume output/mini/stage2/checkpoint-last.pth --dtype fp16 \
    --output $MINI/structmar_mini_stage2.safetensors
step "stage 2 goes on with phrases of boxes (7 minutes on one thread)"
if [ ! -e $MINI/structmar_mini_phrases.safetensors ]; then
    $python main_mar.py --config configs/mini_phrases.yaml --precision "$PRECISION"
    $python -m scripts.export_weights --resume output/mini/phrases/checkpoint-last.pth --dtype fp16 \
        --output $MINI/structmar_mini_phrases.safetensors
fi
step "codes of the same scenes, then MaskGIL on them, all parts from scratch (an hour on one thread)"
if [ ! -e $MINI/maskgil_mini_stage2.safetensors ]; then
    $python -m scripts.cache_latents --coco_root data/mini_coco_18k --coco_split train2017 \
        --cached_path data/mini_cache_vq_18k/train2017 --vae_path $MINI/vq/vq4_mini.pt --clip_path $MINI/clip-text-mini \
        --img_size 64 --device cpu --num_workers 0
    $python main_mar.py --config configs/mini_discrete.yaml --precision "$PRECISION"
    $python -m scripts.export_weights --resume output/mini/discrete/checkpoint-last.pth --dtype fp16 \
        --output $MINI/maskgil_mini_stage2.safetensors
fi
step "planner: captions to layouts (6 minutes on one thread)"
if [ ! -e $MINI/planner_mini.safetensors ]; then
    $python -m scripts.train_planner --config configs/mini_planner.yaml
    cp output/mini/planner/planner.safetensors $MINI/planner_mini.safetensors
fi
step "speech recogniser (20 minutes on one thread; needs espeak-ng)"
build_if_missing $MINI/recogniser-mini/config.json $python -m scripts.mini.train_recogniser \
    --output $MINI/recogniser-mini
step "Faster R-CNN (13 minutes), and another one that judges what stage 3 makes for the first (10 minutes)"
build_if_missing $MINI/fasterrcnn_mini.pth $python -m scripts.mini.train_detector --output $MINI/fasterrcnn_mini.pth
build_if_missing $MINI/fasterrcnn_mini_judge.pth $python -m scripts.mini.train_detector \
    --output $MINI/fasterrcnn_mini_judge.pth --arch fasterrcnn_mini_fpn --seed 1 --steps 2400 --soften_prob 0.5
step "the README's picture and numbers (20 minutes)"
$python -m scripts.sample --config configs/mini_sample.yaml --layout "" --coco_root data/mini_coco --coco_split val2017 \
    --num_images 16 --grid_scale 3 --output_dir output/mini/samples
$python -m scripts.evaluate_layout --config configs/mini_eval.yaml --seeds 0 1 2 --without_layout --precision "$PRECISION"
$python -m scripts.mini.colour_accuracy --images output/mini/evaluation/images/seed_{0,1,2} \
    --output output/mini/evaluation/colour.json
echo "grid: output/mini/samples/grid.png"
