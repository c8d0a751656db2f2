"""A language model's directory is opened as it is, or refused with one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.frozen.causal_lm import causal_lm_files, files_id, open_causal_lm, require_same_base
from tests.helpers.language_models import FAMILIES


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    FAMILIES["qwen2 tied"]().save_pretrained(tmp_path / "lm")
    (tmp_path / "lm" / "tokenizer.json").write_text("{}")
    return tmp_path / "lm"


@pytest.mark.parametrize("family", ["qwen2 tied", "llama"])
@pytest.mark.parametrize("shard", ["5MB", "10KB"])
def test_it_is_the_one_that_was_saved(tmp_path: Path, family: str, shard: str) -> None:
    lm = FAMILIES[family]()
    lm.save_pretrained(tmp_path, max_shard_size=shard)
    state = torch.get_rng_state()
    again, lm_id = open_causal_lm(tmp_path, torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, lm(input_ids=ids).logits)
    assert again.config._attn_implementation == "sdpa" and not again.training
    assert len(list(tmp_path.glob("*.safetensors"))) == len(causal_lm_files(tmp_path)) - 1
    assert lm_id == files_id(causal_lm_files(tmp_path)) and len(lm_id) == 64
    assert open_causal_lm(tmp_path, torch.bfloat16)[0].dtype == torch.bfloat16


def test_the_id_is_of_weights_config_and_tokenizer(directory: Path) -> None:
    seen = {files_id(causal_lm_files(directory))}
    for name in ("tokenizer.json", "config.json", "model.safetensors"):
        with (directory / name).open("ab") as file:
            file.write(b" ")
        seen.add(files_id(causal_lm_files(directory)))
    (directory / "notes.txt").write_text("not a part of it")
    seen.add(files_id(causal_lm_files(directory)))
    assert len(seen) == 4


def with_config(**values: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, **values}))

    return change


def with_a_tensor_more(directory: Path) -> None:
    state = load_file(directory / "model.safetensors")
    save_file({**state, "more": torch.zeros(1)}, directory / "model.safetensors", {"format": "pt"})


def without_a_tensor(directory: Path) -> None:
    state = load_file(directory / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (with_config(auto_map={"AutoModelForCausalLM": "m.X"}), ValueError, "auto_map {'AutoModelForCausalLM': 'm.X'}"),
        (without_a_tensor, ValueError, r"do not fit config.json: missing_keys \['model.norm.weight'\]"),
        (with_a_tensor_more, ValueError, r"do not fit config.json: unexpected_keys \['more'\]"),
        (with_config(intermediate_size=25), ValueError, "do not fit config.json: mismatched_keys"),
        (lambda path: (path / "config.json").write_text("{"), ValueError, "config.json is not JSON"),
        (lambda path: (path / "config.json").write_text("[]"), ValueError, "config.json is no JSON object"),
        (lambda path: (path / "config.json").unlink(), FileNotFoundError, "lm has no config.json"),
        (lambda path: (path / "model.safetensors").unlink(), FileNotFoundError, "lm has no model.safetensors"),
    ],
)
def test_another_directory_is_refused(
    directory: Path, change: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    change(directory)
    with pytest.raises(error, match=message):
        open_causal_lm(directory, torch.float32)


def test_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no language model's directory at"):
        open_causal_lm(tmp_path / "none", torch.float32)


def test_another_base_is_refused() -> None:
    require_same_base("a.pth", "abc", "abc", "lm")
    with pytest.raises(ValueError, match="a.pth was trained on the language model abc, the one in lm is def"):
        require_same_base("a.pth", "abc", "def", "lm")
