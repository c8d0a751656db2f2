"""Every command-line flag, in groups: the mains and the scripts pick the groups they need (stage 3's: arguments_rl.py).

MAR's flags keep MAR's names. A size whose default reads "the preset's" is None until `build.py` asks the preset.
A flag's `type` is its range (`util/ranges.py`).
"""

from __future__ import annotations

import argparse

from engine.cli.arguments_class import add_class_args
from engine.cli.arguments_mars import add_mars_args
from engine.cli.arguments_model import add_model_args
from engine.cli.arguments_sampling import add_sampling_args
from engine.cli.arguments_scores import add_preview_args
from engine.cli.speed import SPEEDS, speed_preset
from models.config import MASK_SCHEDULES, MAX_HEAD_EVALS, RESNET50_FPN_V2, SCORED
from models.sampling.few import DEFAULT_EVALS
from util.config import Parser, PresetAction, Switch
from util.names import BEST_BY
from util.ranges import (
    Range,
    batch_int,
    device_name,
    fraction,
    fraction_below_one,
    nonnegative_float,
    nonnegative_int,
    picture_size,
    positive_float,
    positive_int,
    seed_int,
    threads_int,
    whole,
    workers_int,
)

DEFAULT_VAE = "./pretrained_models/vae/kl16.ckpt"
VAE_HELP = "image tokenizer: a KL VAE (LDM's layout) or a VQ (LlamaGen's file or a folder of diffusers)"
DEFAULT_CLIP = "./pretrained_models/clip-vit-base-patch32"
DEFAULT_DETECTOR = f"./pretrained_models/{RESNET50_FPN_V2}_coco.pth"
SWITCH = Switch


def train_parser() -> argparse.ArgumentParser:
    """The parser of main_mar.py."""
    parser = Parser(
        prog="main_mar.py",
        description="StructMAR stages 1 (--train_mode text_layout) and 2 (--train_mode full) on COCO. Before them: "
        "pretraining by class (--train_mode class) on a folder such as ImageNet's. After them: guidance trained into "
        "the weights (--train_mode distill), and a head that draws in few evaluations (--train_mode few_step).",
    )
    add_config_arg(parser)
    add_model_args(parser)
    add_frozen_args(parser)
    add_data_args(parser)
    add_class_args(parser)
    add_mars_args(parser)
    add_train_args(parser)
    add_few_step_args(parser)
    add_optim_args(parser)
    add_run_args(parser)
    add_sampling_args(parser)
    add_preview_args(parser)
    return parser


def script_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of a program that is started by `python -m module`, with --debug."""
    parser = Parser(prog=f"python -m {module}", description=description)
    add_debug_arg(parser)
    return parser


def add_ema_arg(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--ema", action=SWITCH, was="no_ema", default=True, help="a checkpoint's averaged weights, else its raw ones"
    )


def add_config_arg(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default=None, help="YAML file of flags; the command line wins over it")


def add_frozen_args(parser: argparse.ArgumentParser) -> None:
    """The frozen VAE and text encoder."""
    group = parser.add_argument_group("frozen parts")
    group.add_argument("--vae_path", default=DEFAULT_VAE, help=VAE_HELP)
    group.add_argument(
        "--latent_scale",
        type=positive_float,
        default=None,
        help="factor on the latents; None: the VAE file's, or MAR's 0.2325; codes have none",
    )
    add_text_encoder_args(group)


def add_text_encoder_args(
    group: argparse._ActionsContainer, default: str = DEFAULT_CLIP, is_required: bool = False
) -> None:
    """The frozen text encoder. --clip_path is its older name, of files and checkpoints too."""
    group.add_argument(
        "--text_encoder", "--clip_path", dest="clip_path", metavar="DIR", default=default, required=is_required,
        help="local Hugging Face directory of the text encoder: a CLIP, or a causal language model"
    )  # fmt: skip
    group.add_argument(
        "--max_text_tokens", type=whole(2, 10**6), default=None,
        help="tokens that are read of a caption; None: all that a CLIP has positions for, 128 of a language model's"
    )  # fmt: skip


def add_data_args(parser: argparse.ArgumentParser) -> None:
    """COCO captions and boxes."""
    group = parser.add_argument_group("data")
    group.add_argument("--coco_root", default="./data/coco", help="folder with annotations/ and the image folders")
    group.add_argument(
        "--coco_split", default="train2014",
        help="a split with captions_ and instances_ json files, or a folder of pictures with .bbox and .txt files; a+b "
             "joins two"
    )  # fmt: skip
    group.add_argument("--caption_mode", default="random", choices=["random", "all"],
                       help="random: one caption per image and epoch; all: an epoch visits every caption")  # fmt: skip
    group.add_argument("--crop", default="center", choices=["center", "random"], help="how images become square")
    group.add_argument("--hflip_prob", type=fraction, default=0.5, help="probability of mirroring image and boxes")
    group.add_argument(
        "--min_area", type=fraction, default=0.01, help="smallest box kept, as a fraction of the crop's area"
    )
    group.add_argument(
        "--min_visibility", type=fraction, default=0.2, help="smallest fraction of a box left by the crop"
    )
    group.add_argument("--keep_crowd", action=SWITCH, default=False, help="keep boxes marked iscrowd")
    group.add_argument("--use_cached", action=SWITCH, default=False, help="train from the cache in --cached_path")
    group.add_argument("--cached_path", default="", help="folder written by scripts.cache_latents")
    group.add_argument("--check_data", action=SWITCH, default=False, help="look at all that the run reads, then end")
    group.add_argument("--num_workers", type=workers_int, default=4, help="data loading processes per GPU")
    group.add_argument("--pin_mem", action=SWITCH, default=True, help="pin batches for CUDA")


def add_train_args(parser: argparse.ArgumentParser) -> None:
    """What trains, on what, for how long."""
    group = parser.add_argument_group("training")
    group.add_argument(
        "--train_mode",
        default="text_layout",
        help="stage 1, text_layout: the new parts; stage 2, full: everything; text_proj: text parts; "
             "backbone: full without the head; class: pretraining on --class_root, without captions and boxes; "
             "distill: after stage 2, trains the guidance of --cfg_text and --cfg_layout into the weights; "
             "with --backbone mars: joint, refine or upscale",
    )  # fmt: skip
    group.add_argument("--buckets", action=SWITCH, default=False,
                       help="pictures of aspect ratios up to 4, about as large as --img_size's squares")  # fmt: skip
    group.add_argument("--sizes", type=picture_size, nargs="+", default=None,
                       help="HEIGHTxWIDTH of the pictures, the nearest for each image; none: --img_size")  # fmt: skip
    group.add_argument("--phrase_prob", type=fraction, default=None,
                       help="probability of a box being given by its phrase, half of these without their class; None: "
                            "0.5 with --phrases, else 0")  # fmt: skip
    add_length_args(group)
    group.add_argument(
        "--max_steps", type=positive_int, default=None, help="stop after this many optimizer steps of this stage"
    )
    add_sft_args(group)


def add_device_arg(group: argparse._ActionsContainer, default: str = "auto") -> None:
    group.add_argument(
        "--device", type=device_name, default=default, help="cpu, cuda, cuda:N, or auto: cuda if there is one, else cpu"
    )


def add_compile_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--compile", action=SWITCH, default=False, help="torch.compile every block and the head")
    group.add_argument(
        "--cuda_graphs", action=SWITCH, default=False, help="--compile, and sampling captures the head as CUDA graphs"
    )


def add_length_args(group: argparse._ArgumentGroup) -> None:
    """Where a stage starts, how much it takes at a time, for how long."""
    group.add_argument("--resume", default="",
                       help="checkpoint file, or a folder with checkpoint-last.pth: continued if this stage wrote it, "
                            "else the weights to start from (MAR's, or another stage's EMA weights); "
                            "best: start over from the weights that --keep_best kept in --output_dir")  # fmt: skip
    group.add_argument("--auto_resume", action=SWITCH, was="no_auto_resume", default=True,
                       help="continue from a checkpoint-last.pth found in --output_dir; else start over")  # fmt: skip
    group.add_argument("--batch_size", type=batch_int, default=64, help="images per process and forward pass")
    group.add_argument("--accum_iter", type=positive_int, default=1, help="forward passes per optimizer step")
    group.add_argument("--epochs", type=positive_int, default=20, help="epochs of this stage")
    group.add_argument("--ema_rate", type=fraction, default=0.9999, help="decay of the average of what trains")
    group.add_argument(
        "--ema_warmup", action=SWITCH, default=None,
        help="lower --ema_rate over the first steps, (1 + n) / (10 + n), so that a short run's average follows; None: "
             "on, but a continued run goes on as it was (MAR has none)"
    )  # fmt: skip


def add_sft_args(group: argparse._ArgumentGroup) -> None:
    """The loss on given images."""
    group.add_argument("--mask_schedule", default=None, choices=MASK_SCHEDULES,
                       help="how the fraction of tokens masked in training is drawn: MAR's Gaussian, or a curve of a "
                            "uniform number; None: truncnorm, or (discrete head) arccos, or (--train_mode distill, "
                            "--objective reward_gradient) linear")  # fmt: skip
    group.add_argument(
        "--mask_ratio_min",
        type=Range(float, "must lie in (0, 1)", 0, 1, "()"),
        default=0.7,
        help="smallest fraction of tokens masked in training by --mask_schedule truncnorm",
    )
    group.add_argument("--loss_on", default=None, choices=SCORED,
                       help="tokens that a discrete head is scored on; None: masked")  # fmt: skip
    group.add_argument("--label_smoothing", type=fraction_below_one, default=None,
                       help="of a discrete head's loss; None: 0.1")  # fmt: skip
    group.add_argument(
        "--label_drop_prob", type=fraction, default=None,
        help="probability of dropping text and layout together; None: 0.1, or (--train_mode distill) 0"
    )  # fmt: skip
    group.add_argument("--text_drop_prob", type=fraction, default=0.0, help="probability of dropping the text alone")
    group.add_argument(
        "--layout_drop_prob", type=fraction, default=0.0, help="probability of dropping the layout alone"
    )


def add_few_step_args(parser: argparse.ArgumentParser) -> None:
    """What a few-step head learns from."""
    group = parser.add_argument_group("few-step head", "for --train_mode few_step; its teacher draws by the sampling "
                                      "flags")  # fmt: skip
    group.add_argument("--few_evals", type=whole(1, MAX_HEAD_EVALS), default=DEFAULT_EVALS,
                       help="evaluations that previews and scores take, and that the weights name; 1, 2 and 4 are "
                            "trained")  # fmt: skip
    group.add_argument("--few_tokens", type=positive_int, default=16, help="tokens that are drawn of each image")
    group.add_argument("--few_draws", type=whole(2, 64), default=2,
                       help="draws of each, by the teacher and by the head")  # fmt: skip


def add_optim_args(parser: argparse.ArgumentParser) -> None:
    """AdamW and its schedule."""
    group = parser.add_argument_group("optimizer")
    group.add_argument(
        "--lr", type=positive_float, default=None, help="learning rate; None: blr * images per step / 256"
    )
    group.add_argument("--blr", type=nonnegative_float, default=1e-4, help="learning rate per 256 images of a step")
    group.add_argument("--min_lr", type=nonnegative_float, default=0.0, help="where the cosine schedule ends")
    group.add_argument("--lr_schedule", default="constant", choices=["constant", "cosine"], help="after the warmup")
    group.add_argument("--warmup_epochs", type=nonnegative_float, default=5.0, help="epochs of linear warmup")
    group.add_argument(
        "--weight_decay", type=nonnegative_float, default=0.02, help="not on biases, norms and the diffusion head"
    )
    group.add_argument(
        "--grad_clip", type=nonnegative_float, default=3.0, help="largest gradient norm; 0 does not clip"
    )


def add_run_args(parser: argparse.ArgumentParser) -> None:
    """Where and how it runs."""
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", default="./output/stage1_align", help="run folder")
    group.add_argument("--log_dir", default=None, help="TensorBoard folder; None: tensorboard/ in --output_dir")
    add_device_arg(group)
    group.add_argument("--seed", type=seed_int, default=1, help="every draw is derived from it")
    group.add_argument(
        "--precision", default="fp32", choices=["fp32", "bf16"], help="bf16: autocast; weights stay fp32"
    )
    add_compile_args(group)
    group.add_argument(
        "--fsdp", action=SWITCH, default=False, help="shard weights, gradients and optimizer over the processes"
    )
    group.add_argument(
        "--num_threads", type=threads_int, default=None, help="CPU threads per process; None: PyTorch's choice"
    )
    group.add_argument(
        "--profile_steps", default="",
        help="write a trace of these steps to profile/ in --output_dir: N steps soon after the start, or FIRST:END"
    )  # fmt: skip
    add_failure_args(group)
    group.add_argument("--log_freq", type=positive_int, default=20, help="optimizer steps between log lines")
    group.add_argument(
        "--save_last_freq", type=positive_int, default=5, help="epochs between saves of checkpoint-last.pth"
    )
    group.add_argument(
        "--save_freq_steps", type=nonnegative_int, default=0, help="optimizer steps between saves too; 0: epochs only"
    )
    group.add_argument(
        "--keep_every", type=nonnegative_int, default=0,
        help="optimizer steps between checkpoints that stay, as checkpoint-<step>.pth; 0: checkpoint-last.pth only"
    )  # fmt: skip
    group.add_argument(
        "--keep_best", default="", choices=["", *BEST_BY], metavar="NAME",
        help="keep the averaged weights of the best evaluation by this score, as checkpoint-best.safetensors"
    )  # fmt: skip


def add_debug_arg(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--debug", action=SWITCH, default=False, help="show the traceback of an error, not its line alone"
    )


def add_failure_args(group: argparse._ArgumentGroup) -> None:
    """How a program ends that cannot go on."""
    add_debug_arg(group)
    add_timeout_arg(group)


def add_timeout_arg(group: argparse._ArgumentGroup) -> None:
    """For all that may run under torchrun."""
    group.add_argument(
        "--dist_timeout", type=positive_float, default=1800.0,
        help="seconds that a process of torchrun waits for the others before the run ends, naming those that do not "
             "answer; longer than a preview, an evaluation or a save takes"
    )  # fmt: skip


def add_speed_arg(group: argparse._ArgumentGroup) -> None:
    """For programs that sample and do not train: a preset sets --precision too."""
    group.add_argument(
        "--speed", action=PresetAction, expand=speed_preset, default="exact", choices=sorted(SPEEDS),
        help="preset of sampling flags and --precision; a flag that is given too wins; "
             "fast: annealed diffusion steps, bf16; faster: fewer iterations and a condition cache too"
    )  # fmt: skip
