"""Blocks, model and loss are those of the public code: MaskGIL, LlamaGen, Halton-MaskGIT, Chameleon."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.checkpoint.load import load_mar_for_sampling
from models.blocks import Attention, Block, build_mlp
from models.maskgil_names import from_maskgil, renamed_block
from models.norms import RmsNorm
from models.rope import Rotation, rope_angles_2d, with_buffer
from models.structmar import StructMAR
from models.weights import load_mar_weights
from tests.helpers.maskgil import MaskGilReference, maskgil_config

TOLERANCE = {"rtol": 0.0, "atol": 2e-6}


@pytest.fixture(scope="module")
def public(shared: Path) -> MaskGilReference:
    return MaskGilReference(shared)


def block_of(public: MaskGilReference, module: str, **options: object) -> Block:
    block = Block(maskgil_config(**options), 64, 4, text_dim=0).eval()
    block.load_state_dict({renamed_block(name): value for name, value in public.weights(module).items()})
    return block


def rotation_of(table: Tensor) -> Rotation:
    """The public tables: [n, d/2, 2], cosine and sine."""
    return Rotation(table[None, ..., 0], table[None, ..., 1])


@torch.no_grad()
def test_block_of_maskgil(public: MaskGilReference) -> None:
    data, block = public.tensors, block_of(public, "maskgil_block")
    x = data["block.x"]
    torch.testing.assert_close(block.norm1(x), data["block.rms"], **TOLERANCE)
    torch.testing.assert_close(block.mlp(x), data["block.ffn"], **TOLERANCE)
    for kind in ("1d", "2d", "2d_identity"):
        rotation = rotation_of(data[f"block.rope_{kind}"])
        torch.testing.assert_close(block.attn.attend(x, rotation, None), data[f"block.attention_{kind}"], **TOLERANCE)
        torch.testing.assert_close(block.run(x, rotation, None, None), data[f"block.out_{kind}"], **TOLERANCE)


def test_rotations_of_llamagen(public: MaskGilReference) -> None:
    """Row first, and our buffer tokens stand still."""
    ours = Rotation.by(with_buffer(rope_angles_2d((4, 4), 16, axes="yx"), 1)[None])
    theirs = rotation_of(public.tensors["block.rope_2d_identity"])
    torch.testing.assert_close(ours.cos, theirs.cos, **TOLERANCE)
    torch.testing.assert_close(ours.sin, theirs.sin, **TOLERANCE)


@torch.no_grad()
def test_queries_and_keys_of_halton_maskgit(public: MaskGilReference) -> None:
    data, weights = public.tensors, public.weights("halton_block")
    config = maskgil_config(qk_norm="full_rms", rope_mode="off")
    attention, mlp = Attention(config, 64, 4).eval(), build_mlp(config, 64).eval()
    qkv = torch.cat([weights[f"attn.w{part}.weight"] for part in "qkv"])
    attention.load_state_dict({"qkv.weight": qkv, "proj.weight": weights["attn.wo.weight"]})
    mlp.load_state_dict({f"{ours}.weight": weights[f"ff.{theirs}.weight"]
                         for ours, theirs in (("fc1_g", "w1"), ("fc1_x", "w3"), ("fc2", "w2"))})  # fmt: skip
    torch.testing.assert_close(attention.attend(data["block.x"], None, None), data["halton.attention"], **TOLERANCE)
    torch.testing.assert_close(mlp(data["block.x"]), data["halton.ffn"], **TOLERANCE)


@torch.no_grad()
def test_block_of_chameleon(public: MaskGilReference) -> None:
    weights = public.weights("chameleon_layer")
    own = {
        "norm1.weight": weights["input_layernorm.weight"],
        "norm2.weight": weights["post_attention_layernorm.weight"],
        "attn.qkv.weight": torch.cat([weights[f"self_attn.{part}_proj.weight"] for part in "qkv"]),
        "attn.proj.weight": weights["self_attn.o_proj.weight"],
        "mlp.fc1_g.weight": weights["mlp.gate_proj.weight"],
        "mlp.fc1_x.weight": weights["mlp.up_proj.weight"],
        "mlp.fc2.weight": weights["mlp.down_proj.weight"],
    }
    own |= {f"attn.{part}_norm.{leaf}": weights[f"self_attn.{part}_norm.{leaf}"].flatten()
            for part in "qk" for leaf in ("weight", "bias")}  # fmt: skip
    options = {"qk_norm": "head_layer", "norm_position": "res_post", "rope_mode": "off"}
    block = Block(maskgil_config(**options), 64, 4, text_dim=0).eval()
    block.load_state_dict(own)
    found = block.run(public.tensors["block.x"], None, None, None)
    torch.testing.assert_close(found, public.tensors["chameleon.out"], **TOLERANCE)


def class_logits(model: StructMAR, codes: Tensor, labels: Tensor, hidden: int, rotation: Rotation) -> Tensor:
    """[B, L, K] of MaskGIL's input, in which `hidden` stands for a hidden code; with their rotations."""
    tokens = codes.flatten(1)[..., None].float()  # [B, L, 1]
    is_hidden = codes.flatten(1) == hidden  # [B, L]
    kept = torch.where(is_hidden, is_hidden.shape[1], torch.arange(is_hidden.shape[1])).sort(1).values  # [B, L]
    context = model.prepare(model.embed_conditions(len(codes), labels), torch.float32)
    layers = tuple(replace(layer, rotation=rotation) for layer in context.decoder)
    z = model.predict(tokens * ~is_hidden[..., None], kept, replace(context, decoder=layers))  # [B, L, D]
    return model.code_head.logits(z)[:, :, 0]


@torch.no_grad()
def test_model_of_maskgil(public: MaskGilReference) -> None:
    """Their sequence ends with the class, ours begins with it; their first rotation is blank, and image token 0's."""
    data = public.tensors
    model = StructMAR(maskgil_config()).eval()
    report = load_mar_weights(model, from_maskgil(public.weights("maskgil_tiny"), "file"), "file")
    assert (report.new, report.ignored) == ((), ())
    labels = torch.where(data["model.drop"].bool(), -1, data["model.labels"])
    found = class_logits(model, data["model.input"], labels, 32, released_rotation())
    torch.testing.assert_close(found, data["model.logits"][..., :32], rtol=0, atol=5e-6)


@torch.no_grad()
def test_loss_of_maskgil(public: MaskGilReference) -> None:
    """Their hidden code is a class as any other: with 33 codes ours is the same loss."""
    data, weights = public.tensors, public.weights("maskgil_tiny")
    renamed = from_maskgil(weights, "file")
    renamed["z_proj.codes.weight"] = weights["tok_emb.weight"][:33]
    renamed["code_head.out.weight"] = weights["output.weight"]
    model = StructMAR(maskgil_config(codebook_size=33)).eval()
    load_mar_weights(model, renamed, "file")
    labels = torch.where(data["model.drop"].bool(), -1, data["model.labels"])
    logits = class_logits(model, data["model.input"], labels, 32, released_rotation())
    torch.testing.assert_close(logits, data["model.logits"], rtol=0, atol=5e-6)
    target = data["model.codes"].flatten(1).reshape(-1, 1).float()  # [B * L, 1]
    head = model.code_head
    loss = F.cross_entropy(logits.flatten(0, 1), target[:, 0].long(), label_smoothing=head.label_smoothing)
    torch.testing.assert_close(loss, data["model.loss_all_smoothed"])
    head.out = nn.Identity()  # so that rows of logits are what the head scores
    scored = head.token_loss(target, logits.flatten(0, 1), head.sample_noise(0, torch.Generator())).mean()
    torch.testing.assert_close(scored, data["model.loss_all_smoothed"])


def released_rotation() -> Rotation:
    """By raster position, not by row and column; of the class, which they put last, and the image tokens, the first of
    which gets the blank row."""
    frequencies = 10000 ** (-torch.arange(0, 16, 2) / 16)  # [8]
    angles = torch.arange(256)[:, None] * frequencies  # [256, 8]
    cos, sin = (torch.cat([torch.zeros(1, 8), table]) for table in (angles.cos(), angles.sin()))  # [257, 8] each
    ours = [256, *range(256)]
    return Rotation(cos[ours][None], sin[ours][None])


@torch.no_grad()
def test_model_of_llamagen(public: MaskGilReference) -> None:
    """The same blocks under a causal mask: what was drawn code by code is scored by them too."""
    data, weights = public.tensors, public.weights("llamagen_tiny")
    labels, codes = data["llamagen.labels"], data["llamagen.codes"]
    classes, table = weights["cls_embedding.embedding_table.weight"], weights["tok_embeddings.weight"]
    x = torch.cat([classes[labels][:, None], table[codes[:, :-1]]], dim=1)  # [B, 16, D]
    causal = torch.full((16, 16), -torch.inf).triu(1).expand(2, 1, -1, -1)  # [B, 1, 16, 16]
    rotation = rotation_of(data["block.rope_2d"][:16])
    for index in range(2):
        prefix = f"layers.{index}."
        own = {renamed_block(n.removeprefix(prefix)): v for n, v in weights.items() if n.startswith(prefix)}
        block = Block(maskgil_config(), 64, 4, text_dim=0).eval()
        block.load_state_dict(own)
        x = block.run(x, rotation, causal, None)
    norm = RmsNorm(64)
    norm.load_state_dict({"weight": weights["norm.weight"]})
    found = norm(x) @ weights["output.weight"].T
    torch.testing.assert_close(found, data["llamagen.logits"], rtol=0, atol=5e-6)


def test_file_of_maskgil(public: MaskGilReference, tmp_path: Path) -> None:
    weights = public.weights("maskgil_tiny")
    save_file(weights, tmp_path / "bare.safetensors")
    torch.save({"model": weights, "steps": 3}, tmp_path / "checkpoint.pt")
    for name in ("bare.safetensors", "checkpoint.pt"):
        model = load_mar_for_sampling(tmp_path / name, maskgil_config())
        assert torch.equal(model.fake_latent[0], weights["tok_emb.weight"][-1])
        assert torch.equal(model.mask_token[0, 0], weights["tok_emb.weight"][32])
        assert torch.equal(model.decoder_blocks[1].mlp.fc1_x.weight, weights["layers.1.feed_forward.w3.weight"])
    with pytest.raises(ValueError, match=r"bare.safetensors does not fit the model: missing .*attn.q_norm.weight"):
        load_mar_for_sampling(tmp_path / "bare.safetensors", maskgil_config(qk_norm="head_rms"))
    with pytest.raises(ValueError, match=r"unknown \['adapter.weight'\]"):
        load_mar_weights(
            StructMAR(maskgil_config()), from_maskgil(weights | {"adapter.weight": torch.ones(1)}, "f"), "f"
        )
    with pytest.raises(ValueError, match=r"f: tok_emb.weight has 34 rows, too few for the 32 codes"):
        from_maskgil(weights | {"tok_emb.weight": torch.ones(34, 64)}, "f")
