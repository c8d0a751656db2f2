"""A causal language model as text encoder: its states, padding, cuts, the folder's identity, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from models.frozen.encoder import load_text_encoder
from models.frozen.lm import MAX_TOKENS, LmEncoder
from models.frozen.text import ClipTextEncoder
from tests.helpers.lm_files import MAX_POSITIONS, WIDTH, write_lm
from tests.helpers.tiny_run import write_clip

CAPTIONS = ["a red dog", "a", "dog red dog red a, dog! 一个红色的苹果", ""]
KINDS = ("qwen2", "llama", "gemma3_text", "gpt2", "gpt_neox")


@pytest.fixture(scope="module")
def lm_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lm(tmp_path_factory.mktemp("lm") / "lm")


@pytest.fixture
def copy_of(tmp_path: Path, lm_dir: Path) -> Path:
    """A copy of the folder that a test may damage."""
    return Path(shutil.copytree(lm_dir, tmp_path / "lm"))


def set_entries(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_transformers_own_divided_by_their_rms(kind: str, tmp_path: Path) -> None:
    encoder = LmEncoder.load(write_lm(tmp_path / kind, kind))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / kind).eval()
    ids = encoder.tokenize(["a red dog"])[0]
    assert ids[0] == 0 and encoder.tokenizer.convert_ids_to_tokens(ids[1:]) == ["a", "Ġred", "Ġdog"]
    with torch.no_grad():
        own = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
    (state,) = encoder.encode(["a red dog"])
    assert state.shape == (4, encoder.dim) and encoder.dim == WIDTH and state.dtype == torch.float32
    torch.testing.assert_close(state, own / own.square().mean(-1, keepdim=True).sqrt(), rtol=0, atol=1e-5)
    assert not state.requires_grad and not encoder.model.training
    (other,) = encoder.encode(["a dog dog"])
    torch.testing.assert_close(state[:2], other[:2], rtol=0, atol=5e-6)  # causal: the past does not see the change
    assert (state[2:] - other[2:]).abs().amax(1).min() > 0.01


def test_padding_does_not_change_states(lm_dir: Path) -> None:
    encoder = LmEncoder.load(lm_dir)
    assert encoder.tokenizer.pad_token is None
    for caption, state in zip(CAPTIONS, encoder.encode(CAPTIONS), strict=True):
        torch.testing.assert_close(state, encoder.encode([caption])[0], rtol=0, atol=5e-6)
        torch.testing.assert_close(state.square().mean(-1), torch.ones(len(state)), rtol=0, atol=1e-5)


def test_context_pads_and_pools(lm_dir: Path) -> None:
    encoder = LmEncoder.load(lm_dir)
    context, states = encoder.context(CAPTIONS), encoder.encode(CAPTIONS)
    assert context.valid.sum(1).tolist() == [len(state) for state in states]
    torch.testing.assert_close(context.pooled, torch.stack([state.mean(0) for state in states]))
    assert context.tokens[~context.valid].abs().max() == 0 and encoder.encode([]) == []
    with pytest.raises(ValueError, match="at least one caption"):
        encoder.context([])


def test_an_empty_caption_is_the_first_token_alone(lm_dir: Path, copy_of: Path) -> None:
    assert LmEncoder.load(lm_dir).tokenize([""]) == [[0]]
    set_entries(copy_of / "tokenizer_config.json", bos_token=None)
    encoder = LmEncoder.load(copy_of)
    assert encoder.tokenize([""]) == [[1]]  # EOS, where there is no BOS
    assert len(encoder.encode([""])[0]) == 1
    set_entries(copy_of / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ValueError, match="a BOS or EOS token"):
        LmEncoder.load(copy_of)


def test_long_captions_are_cut_and_said_once(lm_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder, long = LmEncoder.load(lm_dir), " ".join(["red"] * 200)
    assert encoder.max_tokens == encoder.stated_cut == MAX_TOKENS
    with caplog.at_level(logging.WARNING):
        states, _ = (encoder.encode([long, "a dog"]) for _ in range(2))
    assert [len(state) for state in states] == [MAX_TOKENS, 3]
    assert caplog.text.count("captions that exceed 128 tokens are cut") == 1
    short, longest = LmEncoder.load(lm_dir, max_tokens=5), LmEncoder.load(lm_dir, max_tokens=MAX_POSITIONS)
    torch.testing.assert_close(short.encode([long])[0], states[0][:5], rtol=0, atol=5e-6)  # the past is the same
    assert len(longest.encode([long])[0]) == MAX_POSITIONS
    for wrong in (1, MAX_POSITIONS + 1):
        with pytest.raises(ValueError, match=rf"--max_text_tokens must be from 2 to {MAX_POSITIONS}.*got {wrong}"):
            LmEncoder.load(lm_dir, max_tokens=wrong)


def test_the_id_changes_with_any_file(lm_dir: Path, copy_of: Path) -> None:
    original, seen = LmEncoder.load(lm_dir).id, set()
    assert LmEncoder.load(copy_of).id == original
    (copy_of / ".hidden").write_text("")
    assert LmEncoder.load(copy_of).id == original
    files = sorted(path for path in copy_of.iterdir() if not path.name.startswith("."))
    assert {path.name for path in files} >= {"config.json", "model.safetensors", "tokenizer.json"}
    for path in files:
        before = path.read_bytes()
        if path.suffix == ".json":
            path.write_bytes(before + b"\n")
        else:
            save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path)
        seen.add(LmEncoder.load(copy_of).id)
        path.write_bytes(before)
    (copy_of / "chat_template.jinja").write_text("")
    assert len(seen | {LmEncoder.load(copy_of).id, original}) == len(files) + 2


def test_shards_are_one_model(lm_dir: Path, tmp_path: Path) -> None:
    sharded = write_lm(tmp_path / "shards", max_shard_size="20KB")
    shards = sorted(sharded.glob("*.safetensors"))
    assert len(shards) > 2
    pairs = zip(LmEncoder.load(lm_dir).encode(CAPTIONS), LmEncoder.load(sharded).encode(CAPTIONS), strict=True)
    assert all(torch.equal(whole, part) for whole, part in pairs)
    before = LmEncoder.load(sharded).id
    save_file({name: tensor * 1.01 for name, tensor in load_file(shards[-1]).items()}, shards[-1])
    assert LmEncoder.load(sharded).id != before
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {shards[1].name}, which model.safetensors.index.json names"):
        LmEncoder.load(sharded)


def test_loading_draws_nothing_and_keeps_float32(lm_dir: Path, copy_of: Path) -> None:
    weights = copy_of / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(weights).items()}, weights)
    set_entries(copy_of / "config.json", dtype="bfloat16")
    before = torch.get_rng_state()
    states = LmEncoder.load(copy_of).encode(CAPTIONS)
    assert torch.equal(before, torch.get_rng_state())
    assert {state.dtype for state in states} == {torch.float32}
    torch.testing.assert_close(states[0], LmEncoder.load(lm_dir).encode(CAPTIONS)[0], rtol=0, atol=0.2)


def test_the_config_chooses_the_encoder(lm_dir: Path, copy_of: Path, tmp_path: Path) -> None:
    write_clip(tmp_path / "clip")
    assert isinstance(load_text_encoder(tmp_path / "clip"), ClipTextEncoder)
    assert isinstance(load_text_encoder(lm_dir), LmEncoder)
    set_entries(copy_of / "config.json", model_type="t5")
    with pytest.raises(ValueError, match=r"config\.json has model_type .*t5.*a CLIP or a causal language model"):
        load_text_encoder(copy_of)
    (copy_of / "config.json").unlink()
    for missing in (copy_of, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=missing.name):
            load_text_encoder(missing)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_of_the_folder_is_refused(copy_of: Path, name: str) -> None:
    set_entries(copy_of / name, auto_map={"AutoModelForCausalLM": "modeling.Own"})
    with pytest.raises(ValueError, match=rf"{name} has an auto_map .*no code of a language model's folder is run"):
        load_text_encoder(copy_of)


def test_files_that_are_missing_or_do_not_fit(copy_of: Path) -> None:
    weights = copy_of / "model.safetensors"
    state, whole = load_file(weights), weights.read_bytes()
    del state["model.norm.weight"]
    state["model.layers.0.mlp.up_proj.weight"] = torch.zeros(7)
    save_file(state | {"adapter.weight": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match=r"does not fit its config\.json") as error:
        LmEncoder.load(copy_of)
    assert all(part in str(error.value) for part in ("missing norm.weight", "left over adapter.weight", "shape (7,)"))
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        LmEncoder.load(copy_of)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors or pytorch_model\.bin"):
        LmEncoder.load(copy_of)
    (copy_of / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        LmEncoder.load(copy_of)


def test_a_tokenizer_larger_than_the_embedding(tmp_path: Path, lm_dir: Path) -> None:
    write_lm(tmp_path / "lm")
    found = json.loads((lm_dir / "tokenizer.json").read_text())
    extra = {**found["added_tokens"][0], "id": len(found["model"]["vocab"]), "content": "<|extra|>"}
    set_entries(tmp_path / "lm" / "tokenizer.json", added_tokens=[*found["added_tokens"], extra])
    with pytest.raises(ValueError, match=r"has \d+ tokens, config\.json embeds \d+"):
        LmEncoder.load(tmp_path / "lm")


def test_phrase_tokens(lm_dir: Path) -> None:
    """The states of a phrase in a caption, counted from the first token on."""
    encoder, caption = LmEncoder.load(lm_dir), "a red dog"
    assert [encoder.phrase_tokens(caption, phrase) for phrase in ("a", "Red Dog", "dog")] == [
        range(1, 2), range(2, 4), range(3, 4)
    ]  # fmt: skip
    assert encoder.phrase_tokens("a dog a dog", "dog", 1) == range(4, 5)
    for phrase, number in (("cat", 0), ("", 0), ("dog", 1)):
        assert encoder.phrase_tokens(caption, phrase, number) is None
    assert LmEncoder.load(lm_dir, max_tokens=3).phrase_tokens(caption, "dog") is None  # cut off
