"""A copy of the model for sampling: weights cast to the dtype of sampling or packed, once per run.

In bfloat16, autocast would cast weights at every call. Float32 stay: the residual stream and norms of the backbone,
what is computed once, the way into the head and out of it, and a second head for the first reverse step, where rounding
costs most (`models/heads/diffusion.py`). A discrete head is float32 as a whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from models.heads.packed import can_pack, pack

if TYPE_CHECKING:
    from models.trunk import Trunk


def inference_copy(model: Trunk, dtype: torch.dtype) -> Trunk:
    """The float32 model, or a copy that shares all weights but those that are cast or packed (`heads/packed.py`).

    Cast are the linears of the backbone's blocks, and the head's blocks and adaLN.
    """
    has_diffusion, device = model.config.head == "diffusion", model.fake_latent.device
    packs = has_diffusion and model.compile_mode is None and can_pack(model.config.diffloss_w, dtype, device)
    if dtype == torch.float32 and not packs:
        return model
    with torch.device("meta"):
        copy = type(model)(model.config).eval()  # not `copy.deepcopy`, which sharded models refuse
    copy.load_state_dict({name: weight.detach() for name, weight in model.named_parameters()}, assign=True)
    for name, buffer in model.named_buffers():  # none of them is persistent
        owner, _, leaf = name.rpartition(".")
        copy.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
    if dtype != torch.float32:
        for linear in _backbone_linears(copy):
            _cast(linear, dtype)
            linear.register_forward_pre_hook(_cast_input)
        if has_diffusion:
            for net in copy.diffloss.networks():
                _cast(net.res_blocks, dtype)
                _cast(net.final_layer.adaLN_modulation, dtype)
                net.final_layer.linear.register_forward_pre_hook(_cast_input)
    if packs:
        for net in copy.diffloss.networks():
            pack(net)
    return copy


def _backbone_linears(model: Trunk) -> list[nn.Linear]:
    parts: list[nn.Module] = [model.encoder_blocks, model.decoder_blocks]
    if model.config.trunk == "mae":
        parts.append(model.decoder_embed)
    return [module for part in parts for module in part.modules() if isinstance(module, nn.Linear)]


def _cast(root: nn.Module, dtype: torch.dtype) -> None:
    """Not `Module.to`, which would change the parameters in place."""
    for module in root.modules():
        for name, weight in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(weight.detach().to(dtype), requires_grad=False))


def _cast_input(linear: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return inputs[0].to(cast(nn.Linear, linear).weight.dtype)
