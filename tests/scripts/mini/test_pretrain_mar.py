"""Pretraining of the mini MAR by class: it runs, continues, and writes weights that stage 1 can start from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.structmar import StructMAR, preset_config
from models.weights import is_mar_state, load_mar_weights
from scripts.mini import mar_pretraining, pretrain_mar
from tests.conftest import ROOT
from util.logging import read_metrics

VAE = ROOT / "pretrained_models" / "mini" / "vae" / "kl8_mini.ckpt"


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, steps: int) -> dict[str, torch.Tensor]:
    flags = {"vae_path": VAE, "output": folder / "mar.safetensors", "work_dir": folder / "work", "steps": steps}
    flags |= {"num_images": 24, "batch_size": 12, "diffusion_batch_mul": 1, "num_threads": 1, "precision": "fp32"}
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["pretrain_mar", *argv])
    monkeypatch.setattr(mar_pretraining, "write_samples", lambda *_: None)  # four samples a class take a minute
    assert pretrain_mar.main() == 0
    return load_file(folder / "mar.safetensors")


@pytest.mark.integration
def test_pretrain_and_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(monkeypatch, tmp_path, steps=1)
    second = run(monkeypatch, tmp_path, steps=3)
    assert is_mar_state(second)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert [line["step"] for line in read_metrics(tmp_path / "work" / "metrics.jsonl")] == [1, 3]

    model = StructMAR(preset_config("mar_mini", num_categories=12, text_dim=64))
    report = load_mar_weights(model, second, "mar.safetensors")
    assert report.num_loaded == len(second)
    assert report.ignored == ()


def test_labels_cycle_through_the_classes() -> None:
    """Image k shows class k modulo the classes, the same image every time."""
    assert (mar_pretraining.draw(3, 32, seed=0) == mar_pretraining.draw(3, 32, seed=0)).all()
    assert (mar_pretraining.draw(3, 32, seed=0) != mar_pretraining.draw(15, 32, seed=0)).any()
