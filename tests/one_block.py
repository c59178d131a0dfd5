"""A model of one UNet block, with the layers of a published vector: methods for several subjects go through it.

The attention modules are diffusers' own. Whatever `gensparse.apply` does to a real UNet it does to this one.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from gensparse.families import FAMILIES
from gensparse.families.base import Family
from gensparse.layout import Layout

BLOCK = "up_blocks.0.attentions.0.transformer_blocks.0"
SITE = f"{BLOCK}.attn1"


class OneBlock(nn.Module):
    """`attn1` over the tokens [B, N, C] of `sample`, `attn2` over a text where one is given.

    Args:
        own, cross: the modules; None for none.
    """

    def __init__(self, own: Attention | None = None, cross: Attention | None = None) -> None:
        super().__init__()
        block, attention, up = nn.Module(), nn.Module(), nn.Module()
        attention.transformer_blocks = nn.ModuleList([block])
        up.attentions = nn.ModuleList([attention])
        self.up_blocks = nn.ModuleList([up])
        block.add_module("attn1", picking(1, 2) if own is None else own)
        if cross is not None:
            block.add_module("attn2", cross)

    def forward(
        self,
        sample: Tensor,
        grid: tuple[int, int],
        timestep: float = 500.0,
        encoder_hidden_states: Tensor | None = None,
    ) -> Tensor:
        block = self.get_submodule(BLOCK)
        if encoder_hidden_states is None:
            return block.attn1(sample)
        return block.attn2(sample, encoder_hidden_states=encoder_hidden_states)


FAMILY = Family(
    name="UNet",
    sites=lambda _model, _names: {SITE: "level1"},
    read_layouts=lambda _model, bound, _memo: {"level1": Layout.image(*bound["grid"])},
    layout_for=lambda height, width: Layout.image(height, width),
    native_tokens=lambda _model, _config=None: 1,
)


@contextmanager
def one_block_family() -> Iterator[None]:
    """Makes `OneBlock` a supported model inside the block."""
    FAMILIES["OneBlock"] = __name__
    try:
        yield
    finally:
        del FAMILIES["OneBlock"]


def picking(heads: int, head_dim: int) -> Attention:
    """Attention whose projections pick their third of tokens [B, N, 3 C] = q, k and v side by side."""
    width = heads * head_dim
    attn = Attention(3 * width, heads=heads, dim_head=head_dim, out_dim=width, bias=False, processor=AttnProcessor2_0())
    with torch.no_grad():
        for number, layer in enumerate((attn.to_q, attn.to_k, attn.to_v)):
            layer.weight.copy_(torch.eye(3 * width)[number * width : (number + 1) * width])
        attn.to_out[0].weight.copy_(torch.eye(width))
        attn.to_out[0].bias.zero_()
    return attn


def layer(arrays: Mapping[str, np.ndarray], prefix: str = "") -> Attention:
    """Attention with the weights of a published layer."""
    weights = {name: torch.from_numpy(arrays[f"{prefix}{name}"]) for name in ("w_q", "w_k", "w_v", "w_o", "b_o")}
    heads = int(arrays["heads"])
    attn = Attention(
        weights["w_q"].shape[1],
        cross_attention_dim=weights["w_k"].shape[1],
        heads=heads,
        dim_head=len(weights["w_q"]) // heads,
        bias=False,
        processor=AttnProcessor2_0(),
    )
    with torch.no_grad():
        for target, name in ((attn.to_q, "w_q"), (attn.to_k, "w_k"), (attn.to_v, "w_v"), (attn.to_out[0], "w_o")):
            target.weight.copy_(weights[name])
        attn.to_out[0].bias.copy_(weights["b_o"])
    return attn


def run(model: OneBlock, sample: Tensor, grid: tuple[int, int], step: int = 0, **more: Any) -> Tensor:
    """The output of a step: earlier ones are only counted."""
    with torch.no_grad():
        return model(sample, grid, timestep=500.0 - step, **more)
