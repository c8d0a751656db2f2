"""The paper's three commands as they are printed."""

from __future__ import annotations

import shlex

STAGE_1 = r"""
python main_mar.py \
    --output_dir "./output/stage1_align" \
    --coco_root "./data/coco" \
    --coco_split "train2014" \
    --model mar_huge \
    --diffloss_d 12 \
    --diffloss_w 1536 \
    --resume "./pretrained_models/mar_huge.safetensors" \
    --batch_size 64 \
    --epochs 20 \
    --warmup_epochs 5 \
    --train_mode "text_layout" \
    --blr 1e-4 \
    --label_drop_prob 0.1 \
    --save_last_freq 5 \
    --device cuda
"""


STAGE_2 = r"""
python main_mar.py \
    --output_dir "./output/stage2_sft" \
    --coco_root "./data/coco" \
    --coco_split "train2014" \
    --model mar_huge \
    --diffloss_d 12 \
    --diffloss_w 1536 \
    --resume "./output/stage1_align/checkpoint-last.pth" \
    --batch_size 64 \
    --epochs 100 \
    --warmup_epochs 5 \
    --train_mode "full" \
    --blr 2e-5 \
    --label_drop_prob 0.1 \
    --grad_checkpointing \
    --save_last_freq 5 \
    --device cuda
"""


def words(command: str) -> list[str]:
    """The arguments of a shell command, without `python main_mar.py`."""
    return shlex.split(command.replace("\\\n", " "))[2:]


STAGE_3 = r"""
python main_rl.py \
    --output_dir "./output/stage3_rl_grpo" \
    --coco_root "./data/coco" \
    --coco_split "train2014" \
    --model mar_huge \
    --diffloss_d 12 \
    --diffloss_w 1536 \
    --resume "./output/stage2_sft/checkpoint-last.pth" \
    --detector_path "./pretrained_models/fasterrcnn_resnet50_fpn_v2_coco.pth" \
    --epochs 10 \
    --batch_size 4 \
    --group_size 4 \
    --num_iter 256 \
    --rl_step_ratio 1.0 \
    --kl_coef 0.02 \
    --lr 1e-6 \
    --grad_checkpointing \
    --device cuda
"""
