"""The frozen text encoder: token states, padding, truncation, both directory kinds, and what a bad directory says."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from models.frozen.text import ClipTextEncoder
from tests.helpers.clip_files import text_settings, write_tokenizer

WORDS = ["a</w>", "red</w>", "dog</w>"]
CAPTIONS = ["a red dog", "a", "dog red dog red a, dog!", ""]


@pytest.fixture(scope="module")
def text_dir(tmp_path_factory) -> Path:
    """A CLIPTextModel directory with weights large enough for captions to differ."""
    directory = tmp_path_factory.mktemp("clip") / "text"
    directory.mkdir()
    config = CLIPTextConfig(**text_settings(write_tokenizer(directory)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPTextModel(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def full_dir(tmp_path_factory, text_dir) -> Path:
    """The same text model inside a whole CLIPModel, as openai/clip-vit-base-patch32 has it."""
    directory = tmp_path_factory.mktemp("clip") / "full"
    directory.mkdir()
    vocab_size = write_tokenizer(directory)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text_settings(vocab_size), vision_config=vision, projection_dim=8))
    text_weights = CLIPTextModel.from_pretrained(text_dir).state_dict()
    missing, unexpected = model.text_model.load_state_dict(text_weights, strict=True)
    assert not missing and not unexpected
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def copy_of(tmp_path, text_dir):
    """A copy of the directory that a test may damage."""
    return Path(shutil.copytree(text_dir, tmp_path / "clip"))


def test_states_are_the_final_norms_outputs(text_dir):
    encoder = ClipTextEncoder.load(text_dir)
    model = CLIPTextModel.from_pretrained(text_dir).eval()
    ids = encoder.tokenize(["a red dog"])[0]
    assert encoder.tokenizer.convert_ids_to_tokens(ids) == ["<|startoftext|>", *WORDS, "<|endoftext|>"]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    (state,) = encoder.encode(["a red dog"])
    assert state.shape == (5, encoder.dim) and encoder.dim == 16 and encoder.max_tokens == 12
    torch.testing.assert_close(state, expected, rtol=0, atol=1e-6)
    assert not state.requires_grad and not encoder.model.training


def test_a_caption_does_not_see_its_batch_mates(text_dir):
    encoder = ClipTextEncoder.load(text_dir)
    together = encoder.encode(CAPTIONS)
    assert len({state.shape[0] for state in together}) == len(CAPTIONS)
    for caption, state in zip(CAPTIONS, together, strict=True):
        (alone,) = encoder.encode([caption])
        torch.testing.assert_close(state, alone, rtol=0, atol=2e-6)


def test_context_pads_and_pools(text_dir):
    encoder = ClipTextEncoder.load(text_dir)
    context = encoder.context(CAPTIONS)
    states = encoder.encode(CAPTIONS)
    assert context.valid.sum(1).tolist() == [len(state) for state in states]
    torch.testing.assert_close(context.pooled, torch.stack([state.mean(0) for state in states]))
    assert context.tokens[~context.valid].abs().max() == 0
    with pytest.raises(ValueError, match="at least one caption"):
        encoder.context([])


def test_words_change_states(text_dir):
    encoder = ClipTextEncoder.load(text_dir)
    first, second = encoder.encode(["a red dog", "a dog dog"])
    torch.testing.assert_close(first[:2], second[:2], rtol=0, atol=2e-6)  # causal: the past does not see the change
    assert (first[2:] - second[2:]).abs().amax(1).min() > 0.01


def test_truncation_keeps_eos(text_dir, caplog):
    encoder = ClipTextEncoder.load(text_dir)
    long = " ".join(["red"] * 40)
    with caplog.at_level(logging.WARNING):
        rows = encoder.tokenize([long, "a dog"])
    assert len(rows[0]) == 12 and rows[0][-1] == encoder.tokenizer.eos_token_id
    assert rows[0][:-1] == encoder.tokenize([" ".join(["red"] * 10)])[0][:-1]
    assert "captions that exceed 12 tokens are cut; 1 of the first 2 do" in caplog.text
    assert [len(state) for state in encoder.encode([long, "a dog"])] == [12, 4]
    assert caplog.text.count("are cut") == 1  # once, not with every batch
    assert len(ClipTextEncoder.load(text_dir, max_tokens=5).encode([long])[0]) == 5
    with pytest.raises(ValueError, match=r"from 2 to 12.*got 77"):
        ClipTextEncoder.load(text_dir, max_tokens=77)


def test_a_whole_clip_gives_the_same_states(text_dir, full_dir):
    text, full = ClipTextEncoder.load(text_dir), ClipTextEncoder.load(full_dir)
    for first, second in zip(text.encode(CAPTIONS), full.encode(CAPTIONS), strict=True):
        assert torch.equal(first, second)
    assert text.id != full.id


def test_old_names_bin_files_and_half_precision(copy_of, text_dir):
    """Files of older transformers: a "text_model." prefix, stored position ids, a pickled state dict."""
    state = load_file(copy_of / "model.safetensors")
    old = {f"text_model.{name}": tensor.half() for name, tensor in state.items()}
    old["text_model.embeddings.position_ids"] = torch.arange(12)[None]
    (copy_of / "model.safetensors").unlink()
    torch.save(old, copy_of / "pytorch_model.bin")
    encoder = ClipTextEncoder.load(copy_of)
    (expected,), (state_of_half,) = ClipTextEncoder.load(text_dir).encode(["a dog"]), encoder.encode(["a dog"])
    assert state_of_half.dtype == torch.float32
    torch.testing.assert_close(state_of_half, expected, rtol=0.02, atol=0.02)


def test_loading_leaves_the_global_generator_alone(text_dir):
    before = torch.get_rng_state()
    ClipTextEncoder.load(text_dir)
    assert torch.equal(before, torch.get_rng_state())


def test_id_depends_on_every_file(copy_of, text_dir):
    assert ClipTextEncoder.load(copy_of).id == ClipTextEncoder.load(text_dir).id
    merges = copy_of / "merges.txt"
    merges.write_text(merges.read_text().replace("do g</w>\n", ""))
    assert ClipTextEncoder.load(copy_of).id != ClipTextEncoder.load(text_dir).id


def test_missing_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*huggingface\.co/openai/clip-vit-base-patch32"):
        ClipTextEncoder.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", r"has no config\.json"),
        ("model.safetensors", r"has no model\.safetensors or pytorch_model\.bin"),
        ("vocab.json", r"has no vocab\.json"),
        ("merges.txt", r"has no merges\.txt"),
    ],
)
def test_missing_files(copy_of, name, message):
    (copy_of / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{message}.*huggingface\.co"):
        ClipTextEncoder.load(copy_of)


def test_truncated_weights(copy_of):
    weights = copy_of / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        ClipTextEncoder.load(copy_of)


def test_weights_that_do_not_fit(copy_of):
    weights = copy_of / "model.safetensors"
    state = load_file(weights)
    del state["final_layer_norm.bias"]
    state["encoder.layers.0.mlp.fc1.bias"] = torch.zeros(7)
    save_file(state | {"adapter.weight": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match=r"model\.safetensors") as error:
        ClipTextEncoder.load(copy_of)
    assert "missing final_layer_norm.bias" in str(error.value)
    assert "left over adapter.weight" in str(error.value)
    assert "fc1.bias has shape (7,), config.json implies (32,)" in str(error.value)


def test_tokenizer_larger_than_the_embedding(copy_of):
    vocabulary = json.loads((copy_of / "vocab.json").read_text())
    (copy_of / "vocab.json").write_text(json.dumps(vocabulary | {"extra": len(vocabulary)}))
    with pytest.raises(ValueError, match=f"{len(vocabulary) + 1} tokens, config.json embeds {len(vocabulary)}"):
        ClipTextEncoder.load(copy_of)


def test_phrase_tokens(text_dir: Path) -> None:
    """The states of a phrase in a caption: found whatever its case, counted from BOS on."""
    encoder = ClipTextEncoder.load(text_dir)
    caption = "a red dog"
    tokens = encoder.tokenize([caption])[0]
    for phrase in ("dog", "Red Dog", "a"):
        found = encoder.phrase_tokens(caption, phrase)
        alone = encoder.tokenize([phrase])[0][1:-1]  # without BOS and EOS
        assert [tokens[index] for index in found] == alone
    assert encoder.phrase_tokens("dog a dog", "dog") == range(1, 2)
    assert encoder.phrase_tokens("dog a dog", "dog", 1) == range(3, 4)
    for phrase, number in (("cat", 0), ("", 0), (" ", 0), ("dog", 1)):
        assert encoder.phrase_tokens(caption, phrase, number) is None
    short = ClipTextEncoder.load(text_dir, max_tokens=4)
    assert short.phrase_tokens("a red red dog", "red") is not None
    assert short.phrase_tokens("a red red dog", "dog") is None  # beyond the tokens that are kept
