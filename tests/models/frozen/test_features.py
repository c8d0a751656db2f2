"""Networks that judge pictures: the FID Inception, what stands in for it and under which name, CLIP scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import inception as tv
from torchvision.models.detection.image_list import ImageList
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from models.config import SMALL
from models.frozen import clip_score as clip_score_module
from models.frozen import features
from models.frozen import inception as inception_module
from models.frozen.clip_score import ClipScorer, load_clip
from models.frozen.faster_rcnn import Detector, build_detector, detector_checkpoint, load_detector
from models.frozen.features import FeatureExtractor, load_detector_features
from models.frozen.inception import (
    FidInception,
    FidInceptionA,
    FidInceptionC,
    FidInceptionE,
    FidInceptionLast,
    load_inception,
)
from tests.helpers.clip_files import text_settings, write_tokenizer
from util.checkpoint import save_atomic
from util.images import Picture
from util.types import Category

PROMPTS = ["a red dog", "a", "dog dog dog dog dog dog dog dog dog dog dog"]  # the last is longer than the positions


def pictures(*sizes: tuple[int, int]) -> list[Picture]:
    """One random picture per (height, width)."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


# ---- Inception


def test_inception_has_the_names_and_shapes_of_the_public_file() -> None:
    with torch.device("meta"):
        state = FidInception().state_dict()
        torchvisions = tv.Inception3(aux_logits=False, init_weights=False).state_dict()
    assert len(state) == 566 and list(state) == list(torchvisions)
    expected = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_4a_3x3.bn.running_mean": (192,),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_6a.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_6e.branch7x7dbl_5.bn.bias": (192,),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7c.branch_pool.bn.running_var": (192,),
        "fc.weight": (1008, 2048),
        "fc.bias": (1008,),
    }
    assert {name: tuple(state[name].shape) for name in expected} == expected


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (FidInceptionA(2, pool_features=1), [[3.0, 3.5, 4.0], [4.5, 5.0, 5.5], [6.0, 6.5, 7.0]]),
        (FidInceptionC(2, channels_7x7=1), [[3.0, 3.5, 4.0], [4.5, 5.0, 5.5], [6.0, 6.5, 7.0]]),
        (FidInceptionE(2), [[3.0, 3.5, 4.0], [4.5, 5.0, 5.5], [6.0, 6.5, 7.0]]),
        (FidInceptionLast(2), [[5.0, 6.0, 6.0], [8.0, 9.0, 9.0], [8.0, 9.0, 9.0]]),
    ],
)
def test_pooling_branch(block: tv.InceptionA, expected: list[list[float]]) -> None:
    """1 ... 9 in a square, averaged over the 4, 6 or 9 neighbours that exist; their maximum in the last block.

    The branch is wired to pass its first channel on, so the last channels of the block's output are the pooling's.
    """
    block.eval()
    width = block.branch_pool.conv.out_channels
    block.branch_pool.conv.weight.data.zero_()[:, 0] = np.sqrt(1 + 0.001)  # undoes BatchNorm's epsilon
    x = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    with torch.no_grad():
        output = block(torch.cat([x, -x], 1))
    torch.testing.assert_close(output[0, -width:], torch.tensor(expected).expand(width, 3, 3))
    parent_pool = F.avg_pool2d(x, 3, stride=1, padding=1)[0, 0]  # torchvision's own: 12 / 9 in the corner
    assert not torch.allclose(parent_pool, torch.tensor(expected))


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the Inception's architecture with random weights."""
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = FidInception().half().state_dict()
    save_atomic({name: value for name, value in state.items() if "num_batches" not in name}, path)
    return path


@pytest.fixture(scope="module")
def inception(stand_in: Path) -> FeatureExtractor:
    return load_inception(stand_in)


def test_a_stand_in_is_never_called_fid(
    inception: FeatureExtractor, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert inception.name == "Frechet distance (random.pth)"
    assert len(inception.id) == 64 and inception.dim == 2048
    disguised = stand_in.with_name("pt_inception-2015-12-05-6726825d.pth")
    disguised.hardlink_to(stand_in)
    assert load_inception(disguised).name == f"Frechet distance ({disguised.name})"
    monkeypatch.setattr(inception_module, "sha256_file", lambda path: inception_module.INCEPTION_SHA256)
    assert load_inception(stand_in).name == "FID"
    assert inception_module.INCEPTION_SHA256.startswith("6726825d")


def test_inception_features_follow_the_published_network(
    inception: FeatureExtractor, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torchvision's own network, its pooling function replaced: nine calls, the last by maximum."""
    calls: list[int] = []

    def avg_pool2d(x: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
        calls.append(x.shape[1])
        if len(calls) == 9:
            return F.max_pool2d(x, kernel_size, stride, padding)
        return F.avg_pool2d(x, kernel_size, stride, padding, count_include_pad=False)

    image = pictures((40, 700))[0]  # enlarged one way, reduced the other: antialiasing would show
    found = inception([image])
    assert found.shape == (1, 2048) and found.dtype == torch.float32 and not found.requires_grad
    with torch.device("meta"):
        reference = tv.Inception3(1008, aux_logits=False, init_weights=False)
    state = {name: value.float() for name, value in torch.load(stand_in, weights_only=True).items()}
    reference.load_state_dict(state, assign=True)  # the step counters are filled in by BatchNorm
    reference.fc = torch.nn.Identity()
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    pixels = F.interpolate(pixels, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
    pool = SimpleNamespace(avg_pool2d=avg_pool2d, max_pool2d=F.max_pool2d, relu=F.relu)
    monkeypatch.setattr(tv, "F", pool)
    with torch.no_grad():
        expected = reference.eval()(pixels)
    assert len(calls) == 9
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert expected.std() > 0


def test_inception_errors_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"no Inception weights at .*absent\.pth .*6726825d\.pth"):
        load_inception(tmp_path / "absent.pth")
    with torch.device("meta"):
        names = list(FidInception().state_dict())
    monkeypatch.setattr(inception_module, "sha256_file", lambda path: inception_module.INCEPTION_SHA256)
    path = tmp_path / "other.pth"
    save_atomic({**{name: torch.zeros(1) for name in names}, "AuxLogits.fc.bias": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"other\.pth does not fit the FID Inception: has AuxLogits.fc.bias besides; "):
        load_inception(path)
    save_atomic({"fc.weight": torch.zeros(1000, 2048)}, path)
    with pytest.raises(ValueError, match=r"other\.pth does not fit .*lacks Conv2d_1a_3x3.conv.weight.* more\)"):
        load_inception(path)


def test_state_must_fit_in_shape_and_be_finite() -> None:
    wanted = {"a": torch.zeros(2), "b": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"f does not fit X: a is \(3,\), not \(2,\); b is not finite"):
        features.fitted_state(Path("f"), "X", {"a": torch.zeros(3), "b": torch.tensor([np.inf])}, wanted)


# ---- a detector's backbone


@pytest.fixture(scope="module")
def detector_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("detector") / "detector.pth"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_detector(SMALL, 2)
    save_atomic(detector_checkpoint(model, SMALL, [Category(53, "apple")], torch.float32), path)
    return path


def test_detector_features_are_the_backbones_mean(detector_file: Path) -> None:
    extractor = load_detector_features(detector_file)
    assert extractor.name == f"Frechet distance ({SMALL} features)" and "FID" not in extractor.name
    assert extractor.dim == 96
    detector = load_detector(detector_file)
    assert isinstance(detector, Detector) and extractor.id == detector.id
    model = detector.model
    images = pictures((64, 64), (64, 50), (64, 64))
    found = extractor(images)
    tensor = torch.from_numpy(images[0]).permute(2, 0, 1).float() / 255
    with torch.no_grad():
        resized = F.interpolate((tensor[None] - 0.5) / 0.25, (128, 128), mode="bilinear", align_corners=False)
        expected = model.backbone(resized).mean((2, 3))[0]
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)
    for row, image in enumerate(images):  # nothing leaks from batch mates of another size
        torch.testing.assert_close(extractor([image])[0], found[row], rtol=1e-4, atol=1e-6)
    assert extractor([]).shape == (0, 96)


def test_padding_and_the_pyramids_pool_level_are_left_out() -> None:
    """A map of 4 x 4 cells over 32 x 32 padded pixels, of which 20 x 32 are the picture's: three rows of cells."""
    cells = torch.arange(16.0).view(1, 1, 4, 4)
    maps = {"0": cells * 0, "3": cells, "pool": cells[:, :, ::2, ::2]}
    model = SimpleNamespace(
        transform=lambda images: (ImageList(torch.zeros(1, 3, 32, 32), [(20, 32)]), None), backbone=lambda x: maps
    )
    assert features._backbone_means(model, []).tolist() == [[5.5]]


def test_what_is_no_picture_and_no_detector_is_refused(detector_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = load_detector_features(detector_file)
    with pytest.raises(ValueError, match=r"picture 1 must be uint8 \[H, W, 3\], got float32 \(4, 4, 3\)"):
        extractor([*pictures((4, 4)), np.zeros((4, 4, 3), np.float32)])
    with pytest.raises(ValueError, match=r"picture 0 must be uint8 \[H, W, 3\], got uint8 \(4, 4\)"):
        extractor([np.zeros((4, 4), np.uint8)])
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        load_detector_features("absent.pth")
    monkeypatch.setattr(features, "load_detector", lambda path, device: object())
    with pytest.raises(ValueError, match=r"yolox\.onnx is no Faster R-CNN"):
        load_detector_features("yolox.onnx")


# ---- CLIP


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIPModel, with a preprocessor_config.json as openai/clip-vit-base-patch32 has it."""
    directory = tmp_path_factory.mktemp("clip") / "clip-tiny"
    directory.mkdir()
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    text = text_settings(write_tokenizer(directory))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    write_preprocessor(directory, 16)
    return directory


def write_preprocessor(directory: Path, side: int) -> None:
    settings: dict[str, object] = {
        "crop_size": side,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "size": side,
    }
    settings |= {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "resample": 3}
    settings |= {"feature_extractor_type": "CLIPFeatureExtractor"}
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def scorer(clip_dir: Path) -> ClipScorer:
    return load_clip(clip_dir)


def test_clip_scores_are_transformers_cosines(scorer: ClipScorer, clip_dir: Path) -> None:
    images = pictures((16, 16), (40, 30), (20, 64))
    found = scorer.clip_scores(images, PROMPTS)
    assert found.shape == (3,) and found.dtype == torch.float32 and found.abs().max() <= 1
    model, tokenizer = CLIPModel.from_pretrained(clip_dir).eval(), CLIPTokenizer.from_pretrained(clip_dir)
    processor = CLIPImageProcessor.from_pretrained(clip_dir)
    with torch.no_grad():
        for image, prompt, score in zip(images, PROMPTS, found, strict=True):
            tokens = tokenizer([prompt], return_tensors="pt", truncation=True, max_length=12)
            output = model(**tokens, **processor(images=[image], return_tensors="pt"))
            cosine = output.logits_per_image[0, 0] / model.logit_scale.exp()
            assert score.item() == pytest.approx(cosine.item(), abs=1e-5)
    assert len({round(value, 4) for value in found.tolist()}) == 3
    assert scorer.clip_scores([], []).shape == (0,)


def test_clip_pictures_are_resized_cut_and_normalised(scorer: ClipScorer) -> None:
    """Left half black, right half white, 16 x 32: the central square has the edge in its middle."""
    image = np.zeros((16, 32, 3), np.uint8)
    image[:, 16:] = 255
    pixels = clip_score_module._clip_input(scorer.processor, [image])
    assert pixels.shape == (1, 3, 16, 16)
    expected = torch.tensor([(0 - 0.48) / 0.27, (1 - 0.48) / 0.27])
    torch.testing.assert_close(pixels[0, 0, 5, [0, 15]], expected, rtol=0, atol=1e-4)


def test_clip_is_named_as_what_it_is(scorer: ClipScorer, clip_dir: Path, tmp_path: Path) -> None:
    assert scorer.name == "CLIP score (clip-tiny), cosine" and len(scorer.id) == 64
    other = Path(shutil.copytree(clip_dir, tmp_path / "other"))
    settings = (other / "preprocessor_config.json").read_text()
    (other / "preprocessor_config.json").write_text(settings.replace("0.48", "0.5"))
    changed = load_clip(other)
    assert changed.name == "CLIP score (other), cosine" and changed.id != scorer.id
    assert not any(parameter.requires_grad for parameter in changed.model.parameters()) and not changed.model.training


def test_clip_scores_refuse_wrong_input(scorer: ClipScorer) -> None:
    images = pictures((16, 16), (16, 16))
    with pytest.raises(ValueError, match="2 pictures and 1 prompts"):
        scorer.clip_scores(images, ["a"])
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        scorer.clip_scores(images, ["a", " "])
    with pytest.raises(ValueError, match="picture 0 must be uint8"):
        scorer.clip_scores([np.zeros((16, 16, 3))], ["a"])


def test_clip_directories_that_do_not_do(clip_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no CLIP directory at .*absent"):
        load_clip(tmp_path / "absent")
    other = Path(shutil.copytree(clip_dir, tmp_path / "other"))
    write_preprocessor(other, 8)
    with pytest.raises(ValueError, match="other: preprocessor_config.json makes pictures of 8 x 8 .* image_size is 16"):
        load_clip(other)
    (other / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="other has no preprocessor_config.json"):
        load_clip(other)
    write_preprocessor(other, 16)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"projection_dim": 9}))
    with pytest.raises(
        ValueError, match=r"model\.safetensors does not fit its config\.json: .*\(8, 16\), not \(9, 16\)"
    ):
        load_clip(other)
    (other / "config.json").write_text(json.dumps(config["text_config"]))
    with pytest.raises(ValueError, match="other holds CLIP's text tower alone; a CLIP score needs text and vision"):
        load_clip(other)
    (other / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load_clip(other)
