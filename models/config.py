"""The architecture of a StructMAR as plain values: widths, depths, which parts exist; and the named sizes.

Command lines name what stands here, so this file imports nothing that takes long to import.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from util.plain import from_plain

MAX_TOKENS = 16384  # attention takes memory by their square
ROPE_MODES = ("gated", "full", "off")
TRUNKS = ("mae", "single")
HEADS = ("diffusion", "discrete")
NORMS = ("layer", "rms")
MLPS = ("gelu", "swiglu")
NORM_POSITIONS = ("pre", "res_post")
QK_NORMS = ("none", "head_layer", "head_rms", "full_rms")
ROPE_AXES = ("xy", "yx")
ROPE_SCALES = ("index", "fit")
MASK_SCHEDULES = ("truncnorm", "linear", "square", "cosine", "arccos")  # of the share that training hides
SCORED = ("masked", "all")  # tokens that a discrete head's loss is taken over
_CHOICES = {"rope_mode": ROPE_MODES, "trunk": TRUNKS, "head": HEADS, "norm": NORMS, "mlp": MLPS, "loss_on": SCORED,
            "norm_position": NORM_POSITIONS, "qk_norm": QK_NORMS, "rope_axes": ROPE_AXES,
            "rope_scale": ROPE_SCALES}  # fmt: skip
LARGEST_SIZE = 1 << 16
_MAY_BE_ZERO = ("encoder_depth", "decoder_depth", "num_categories", "text_dim", "cross_attn_every", "codebook_size",
                "code_dim")  # fmt: skip
TRAIN_MODES = ("full", "text_layout", "text_proj", "backbone", "class", "distill", "few_step")
MAX_SCALE = 100.0  # of a box's strength; beyond, pictures are noise
MAX_HEAD_EVALS = 8  # of the few-step head, for a token
NUM_TRAIN_STEPS = 1000  # timesteps of the head's diffusion process
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}  # of matrix products: PyTorch's names of the dtypes
EXPORT_PRECISIONS = PRECISIONS | {"fp16": "float16"}
DETECTORS = SMALL, SMALL_FPN, RESNET50_FPN_V2 = "fasterrcnn_mini", "fasterrcnn_mini_fpn", "fasterrcnn_resnet50_fpn_v2"


def require_reverse_steps(num_steps: int, t_max: int | None) -> None:
    """Raises ValueError for reverse steps, or a first timestep, that the head's diffusion process does not have."""
    if not 1 <= num_steps <= NUM_TRAIN_STEPS:
        raise ValueError(f"num_sampling_steps must lie between 1 and {NUM_TRAIN_STEPS}, got {num_steps}")
    if t_max is not None and not 0 <= t_max < NUM_TRAIN_STEPS:
        raise ValueError(f"t_max must lie between 0 and {NUM_TRAIN_STEPS - 1}, got {t_max}")


@dataclass(frozen=True)
class StructMARConfig:
    """The architecture. `num_categories` or `text_dim` of 0 leave the layout or text parts out; without both, and with
    `rope_mode` off, what remains is MAR. `cross_attn_every` k lets every k-th block attend to the caption; 0 lets none,
    so that the caption enters by its pooled projection alone.

    trunk: `mae`, MAR's encoder of visible tokens and decoder of all; `single`, the decoder's path alone, over buffer
    and all tokens, hidden ones as the mask token. head: `diffusion`, continuous tokens; `discrete`, a class per code of
    a codebook of `codebook_size`. norm, mlp, norm_position (`res_post`: x + N(F(x))), qk_norm (queries and keys, before
    RoPE), rope_axes (`xy`: a head's first half turns with the column), linear_bias: of the trunk's blocks
    (`blocks.py`). code_dim: channels of a code where `patch_size` puts several into a token; 0: the trunk's width.
    label_smoothing, loss_on: of the discrete head's loss. size_condition: sizes and crop join the base condition.
    phrases: boxes may have a phrase beside or instead of their class (`layout.py`).
    rope_scale: on grids that are not `grid`, positions are counted in tokens (`index`), or so that as large an area
    turns as far (`fit`: times the square root of the ratio of the numbers of tokens).
    few_step_head: a second network of the diffusion head draws tokens in a few evaluations (`heads/few_step.py`).

    A new field needs a default that leaves models as they were before it: the files of today lack it."""

    img_size: int = 256
    vae_stride: int = 16
    patch_size: int = 1
    vae_embed_dim: int = 16
    encoder_embed_dim: int = 1024
    encoder_depth: int = 16
    encoder_num_heads: int = 16
    decoder_embed_dim: int = 1024
    decoder_depth: int = 16
    decoder_num_heads: int = 16
    mlp_ratio: float = 4.0
    class_num: int = 1000
    buffer_size: int = 64
    diffloss_d: int = 3
    diffloss_w: int = 1024
    diffusion_batch_mul: int = 1
    attn_dropout: float = 0.0
    proj_dropout: float = 0.0
    grad_checkpointing: bool = False
    num_categories: int = 0
    max_objects: int = 16
    text_dim: int = 0
    cross_attn_every: int = 1
    rope_mode: str = "gated"
    learned_pos: bool = True
    layout_bias_value: float = math.inf
    layout_bias_encoder: bool = True
    layout_bias_decoder: bool = True
    layout_fourier: bool = True
    trunk: str = "mae"
    head: str = "diffusion"
    codebook_size: int = 0
    code_dim: int = 0
    norm: str = "layer"
    mlp: str = "gelu"
    norm_position: str = "pre"
    qk_norm: str = "none"
    rope_axes: str = "xy"
    linear_bias: bool = True
    label_smoothing: float = 0.1
    loss_on: str = "masked"
    size_condition: bool = False
    rope_scale: str = "index"
    phrases: bool = False
    few_step_head: bool = False

    def __post_init__(self) -> None:
        for each in fields(self):
            value, least = getattr(self, each.name), 0 if each.name in _MAY_BE_ZERO else 1
            if each.type == "int" and not least <= value <= LARGEST_SIZE:
                raise ValueError(f"{each.name} must be from {least} to {LARGEST_SIZE}, got {value}")
        step = self.vae_stride * self.patch_size
        if step <= 0:
            raise ValueError(f"vae_stride {self.vae_stride} and patch_size {self.patch_size} must be positive")
        if self.img_size <= 0 or self.img_size % step:
            raise ValueError(f"img_size {self.img_size} is not a multiple of vae_stride x patch_size = {step}")
        self.grid_of((self.img_size, self.img_size))
        for part in ("encoder", "decoder"):
            width, heads = getattr(self, f"{part}_embed_dim"), getattr(self, f"{part}_num_heads")
            if width % heads or (self.rope_mode != "off" and width // heads % 4):
                raise ValueError(f"{part}: width {width} over {heads} heads must give head widths divisible by 4")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if (self.head == "discrete") != (self.codebook_size > 0):
            raise ValueError(f"codebook_size {self.codebook_size} with head {self.head!r}: a discrete head has one")
        if self.head == "discrete" and self.vae_embed_dim != 1:
            raise ValueError(f"a discrete head has one code in a cell: vae_embed_dim 1, got {self.vae_embed_dim}")
        if self.head == "discrete" and self.diffusion_batch_mul != 1:
            raise ValueError(f"a discrete head has no noise: diffusion_batch_mul 1, got {self.diffusion_batch_mul}")
        if self.head == "discrete" and self.few_step_head:
            raise ValueError(f"few_step_head with head {self.head!r}: a discrete head needs one evaluation as it is")
        if self.head != "discrete" and self.loss_on != "masked":
            raise ValueError(f"loss_on {self.loss_on!r} with head {self.head!r}: a discrete head alone scores all")
        single = (self.encoder_depth, self.encoder_embed_dim) == (0, self.decoder_embed_dim)
        if self.trunk == "single" and not single:
            raise ValueError(
                f"a single trunk has no encoder: encoder_depth 0 and encoder_embed_dim {self.decoder_embed_dim} as the "
                f"decoder's, got {self.encoder_depth} and {self.encoder_embed_dim}"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")
        if self.phrases and not (self.num_categories and self.text_dim):
            raise ValueError(
                f"phrases of boxes need layout and text parts, got num_categories {self.num_categories} and text_dim "
                f"{self.text_dim}"
            )
        if self.num_categories and self.max_objects > self.buffer_size:
            raise ValueError(f"max_objects {self.max_objects} does not fit into buffer_size {self.buffer_size}")
        if not self.layout_bias_value >= 0:
            raise ValueError(f"layout_bias_value must be at least 0, got {self.layout_bias_value}")

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens as (rows, columns)."""
        side = self.img_size // self.vae_stride // self.patch_size
        return side, side

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Tokens as (rows, columns) of a picture of (height, width) pixels. Raises ValueError if these are no whole
        tokens, or too many."""
        step = self.vae_stride * self.patch_size
        rows, columns = size[0] // step, size[1] // step
        if min(rows, columns) < 1 or (rows * step, columns * step) != tuple(size):
            raise ValueError(
                f"a picture of {size[0]}x{size[1]} px (height x width): both must be multiples of vae_stride x "
                f"patch_size = {step}"
            )
        if rows * columns > MAX_TOKENS:
            raise ValueError(
                f"these sizes make too many tokens: {size[0]}x{size[1]} px over vae_stride x patch_size = {step} "
                f"is {rows * columns}, at most {MAX_TOKENS} are possible"
            )
        return rows, columns

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raises ValueError naming both grids if learned positions do not know this one."""
        if self.learned_pos and grid != self.grid:
            raise ValueError(
                f"a grid of {grid[0]} x {grid[1]} tokens, but the learned positions of this model are of "
                f"{self.grid[0]} x {self.grid[1]}: other grids need a model with learned_pos=False"
            )

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def codes_per_token(self) -> int:
        """How many codes, each hidden and drawn on its own, make a token of the trunk: 1 but for a single trunk with a
        discrete head and patches. (A trunk of MAE's kind hides and shows whole tokens.)"""
        return self.patch_size**2 if self.head == "discrete" and self.trunk == "single" else 1

    @property
    def token_side(self) -> int:
        """Cells of the latents along the side of what is hidden and drawn on its own."""
        return 1 if self.codes_per_token > 1 else self.patch_size

    def unit_grid(self, grid: tuple[int, int] | None = None) -> tuple[int, int]:
        """(rows, columns) of what is hidden and drawn on its own: the trunk's tokens, or the codes in them. grid: the
        trunk's tokens, the config's by default."""
        rows, columns = self.grid if grid is None else grid
        side = self.patch_size // self.token_side
        return rows * side, columns * side

    @property
    def token_dim(self) -> int:
        """Channels of what is hidden and drawn on its own."""
        return self.vae_embed_dim * self.patch_size**2 // self.codes_per_token

    @property
    def mask_schedule(self) -> str:
        """The default of training's shares of hidden tokens (`masking.mask_ratio`)."""
        return "arccos" if self.head == "discrete" else "truncnorm"

    def has_cross_attention(self, block: int) -> bool:
        """Whether block number `block` (from 0) attends to the caption."""
        every = self.cross_attn_every
        return self.text_dim > 0 and every > 0 and block % every == 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "model config") -> StructMARConfig:
        """The inverse of `to_dict`. A field that an older file lacks gets its default, which means "as before".

        Raises ValueError, beginning with `where`, that names a field which is unknown or has another type.
        """
        return from_plain(cls, values, where)


def _sizes(width: int, depth: int, heads: int, head_depth: int, head_width: int) -> dict[str, Any]:
    return {
        "encoder_embed_dim": width,
        "encoder_depth": depth,
        "encoder_num_heads": heads,
        "decoder_embed_dim": width,
        "decoder_depth": depth,
        "decoder_num_heads": heads,
        "diffloss_d": head_depth,
        "diffloss_w": head_width,
    }


def _maskgil(width: int, depth: int, heads: int, head_depth: int, head_width: int) -> dict[str, Any]:
    """MaskGIL's: one stack of LLaMA's blocks over codes; norms behind attention and MLP, of queries and keys too."""
    sizes = _sizes(width, depth, heads, head_depth, head_width) | {"encoder_depth": 0}
    blocks = {"norm": "rms", "mlp": "swiglu", "norm_position": "res_post", "qk_norm": "head_rms", "linear_bias": False}
    places = {"rope_mode": "full", "rope_axes": "yx", "learned_pos": False, "buffer_size": 16}
    codes = {"head": "discrete", "codebook_size": 16384, "vae_embed_dim": 1, "proj_dropout": 0.1}
    return {"trunk": "single", **sizes, **blocks, **places, **codes}


PRESETS: dict[str, dict[str, Any]] = {
    "mar_mini": _sizes(128, 4, 4, 4, 256)
    | {"img_size": 64, "vae_stride": 8, "buffer_size": 16, "max_objects": 8, "class_num": 12},
    "mar_base": _sizes(768, 12, 12, 6, 1024),
    "mar_large": _sizes(1024, 16, 16, 8, 1280),
    "mar_huge": _sizes(1280, 20, 16, 12, 1536),
    "maskgil_mini": _maskgil(160, 8, 4, 4, 256)
    | {"img_size": 64, "vae_stride": 4, "patch_size": 2, "codebook_size": 1024, "code_dim": 32, "max_objects": 8,
       "class_num": 12},
    "maskgil_base": _maskgil(768, 12, 12, 6, 1024),
    "maskgil_large": _maskgil(1024, 24, 16, 8, 1280),
    "maskgil_xlarge": _maskgil(1280, 36, 20, 12, 1536),
    "maskgil_xxlarge": _maskgil(1536, 48, 24, 12, 1536),
}  # fmt: skip


def preset_config(name: str, **overrides: Any) -> StructMARConfig:
    """The named sizes with some fields replaced. Another trunk than the preset's has as many blocks in all, half of
    them in MAE's encoder; another head has what it needs of the other fields, as far as they are not given: one code in
    a cell, or MAR's 16 channels. Raises ValueError for an unknown name."""
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"unknown model {name!r}; {hint}choose one of {', '.join(PRESETS)}")
    preset = {"trunk": "mae", "head": "diffusion", **PRESETS[name]}
    trunk, head = overrides.get("trunk", preset["trunk"]), overrides.get("head", preset["head"])
    if trunk != preset["trunk"]:
        depth = preset["encoder_depth"] + preset["decoder_depth"]
        encoder_depth = depth // 2 if trunk == "mae" else 0
        preset |= {"encoder_depth": encoder_depth, "decoder_depth": depth - encoder_depth}
    if head != preset["head"]:
        preset |= {"vae_embed_dim": 1} if head == "discrete" else {"vae_embed_dim": 16, "codebook_size": 0}
    return StructMARConfig(**(preset | overrides))


def backbone_config(name: str, **overrides: Any) -> StructMARConfig:
    """`preset_config` of published weights: MAR's turn no queries and keys, MaskGIL's do."""
    config = preset_config(name, **overrides)
    return replace(config, rope_mode="off") if config.rope_mode == "gated" else config
