"""The Inception network whose features define FID: pool3 of the Inception of 2015 (Heusel et al. 2017,
arXiv:1706.08500), in the PyTorch port that everybody uses (mseitzer/pytorch-fid).

That port differs from torchvision's Inception v3 in 1008 logits, in average pooling that does not count the padding,
and in max pooling in the last block.

Shape letters: B pictures, C channels, D features, H and W pixels, h and w cells of a feature map.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import inception as tv

from models.frozen.features import FeatureExtractor, fitted_state
from util.checkpoint import load_plain, sha256_file
from util.images import Picture, to_model_range

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_SIDE = 299  # pixels
INCEPTION_DIM = 2048
INCEPTION_LOGITS = 1008
FID = "FID"

_INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)


class _FidPooling:
    """A torchvision Inception block whose pooling branch averages over the pixels inside the picture alone.

    The parent's own pooling branch is computed and dropped (5 % of the network's work): no block is written out again.
    """

    branch_pool: torch.nn.Module

    def pool(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)  # [B, C, h, w]

    def _forward(self, x: Tensor) -> list[Tensor]:
        branches = super()._forward(x)  # type: ignore[misc]  # the block beside this class
        return [*branches[:-1], self.branch_pool(self.pool(x))]  # each [B, C_i, h, w]


class FidInceptionA(_FidPooling, tv.InceptionA):
    """35 x 35 cells."""


class FidInceptionC(_FidPooling, tv.InceptionC):
    """17 x 17 cells."""


class FidInceptionE(_FidPooling, tv.InceptionE):
    """8 x 8 cells."""


class FidInceptionLast(FidInceptionE):
    """The last block, which pools by maximum: the network of 2015 has it so."""

    def pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, kernel_size=3, stride=1, padding=1)  # [B, C, h, w]


class FidInception(tv.Inception3):
    """[B, 3, 299, 299] in [-1, 1] -> 1008 logits; the parameter names are torchvision's, which the file has too."""

    def __init__(self) -> None:
        blocks = [
            tv.BasicConv2d,
            FidInceptionA,
            tv.InceptionB,
            FidInceptionC,
            tv.InceptionD,
            FidInceptionE,
            tv.InceptionAux,
        ]
        super().__init__(INCEPTION_LOGITS, aux_logits=False, inception_blocks=blocks, init_weights=False)
        self.Mixed_7c = FidInceptionLast(INCEPTION_DIM)


def load_inception(path: str | Path, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The 2048 pool3 features of an FID Inception; pictures are resized to 299 x 299, bilinear without antialiasing.

    The name is FID if the file is pytorch-fid's (by its sha256), else "Frechet distance (<file name>)".
    Raises FileNotFoundError or ValueError, one line naming the file, if it does not hold exactly this network.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no Inception weights at {file} (FID's are {_INCEPTION_URL})")
    with torch.device("meta"):  # no initial values: all are replaced
        model = FidInception()
    state = fitted_state(file, "the FID Inception", load_plain(file), model.state_dict())
    model.load_state_dict(state, strict=True, assign=True)
    model.fc = torch.nn.Identity()  # what it would read are the pool3 features
    model.eval().requires_grad_(False).to(device)

    def extract(pictures: Sequence[Picture]) -> Tensor:
        batch = torch.stack([_inception_input(picture, device) for picture in pictures])  # [B, 3, 299, 299]
        return model(batch)  # [B, D]

    file_id = sha256_file(file)
    name = FID if file_id == INCEPTION_SHA256 else f"Frechet distance ({file.name})"
    return FeatureExtractor(name, file_id, INCEPTION_DIM, extract)


def _inception_input(picture: Picture, device: torch.device | str) -> Tensor:
    pixels = to_model_range(picture).to(device)[None]  # [1, 3, H, W]
    side = INCEPTION_SIDE
    return F.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=False)[0]  # [3, 299, 299]
