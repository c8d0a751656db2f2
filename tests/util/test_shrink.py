"""Pictures shrunk as tensors, and how near larger ones come to small ones."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from util.images import center_crop, shrink, shrunk_psnr, to_model_range


def test_shrinking_is_what_datasets_do_to_larger_pictures() -> None:
    picture = np.random.default_rng(0).integers(256, size=(16, 16, 3), dtype=np.uint8)
    small = to_model_range(center_crop(Image.fromarray(picture), 8))
    found = shrink(to_model_range(picture)[None], (8, 8))[0]
    torch.testing.assert_close(found, small, rtol=0, atol=1.01 / 127.5)  # of whole levels


def test_psnr_of_shrunk_pictures_by_hand() -> None:
    small = torch.zeros(2, 3, 2, 2)
    large = torch.tensor([0.2, 0.0]).reshape(2, 1, 1, 1).expand(2, 3, 4, 4)
    torch.testing.assert_close(shrunk_psnr(large, small), torch.tensor([20.0, 100.0]))
