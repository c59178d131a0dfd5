"""A model of one attention layer whose queries, keys and values are its input: published vectors go through it.

The layer is diffusers' own `Attention` with projections that only pick their third of the input, so whatever
`gensparse.apply` does to a real model it does to this one, and the numbers that arrive are those of a file.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

import gensparse
from gensparse.families import FAMILIES
from gensparse.families.base import Family
from gensparse.layout import Layout
from gensparse.methods import Method


class OneLayer(nn.Module):
    """Attention of tokens [B, S, 3 C] = q, k and v side by side.

    Args:
        name: of the attention module, dotted names as deep as they are.
        native: picture tokens at the size of training.
    """

    def __init__(self, heads: int, head_dim: int, *, name: str = "attn", native: int | None = None) -> None:
        super().__init__()
        width = heads * head_dim
        attn = Attention(
            3 * width, heads=heads, dim_head=head_dim, out_dim=width, bias=False, processor=AttnProcessor2_0()
        )
        with torch.no_grad():
            for number, layer in enumerate((attn.to_q, attn.to_k, attn.to_v)):
                layer.weight.copy_(torch.eye(3 * width)[number * width : (number + 1) * width])
            attn.to_out[0].weight.copy_(torch.eye(width))
            attn.to_out[0].bias.zero_()
        *outer, last = name.split(".")
        place: nn.Module = self
        for part in outer:
            place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.add_module(last, attn)
        self.name, self.native = name, native

    def forward(self, hidden_states: Tensor, layout: Layout, timestep: float) -> Tensor:
        return self.get_submodule(self.name)(hidden_states)


FAMILY = Family(
    name="one layer",
    sites=lambda model, _names: {model.name: "joint"},
    read_layouts=lambda _model, bound, _memo: {"joint": bound["layout"]},
    layout_for=lambda height, width: Layout.image(height, width),
    native_tokens=lambda model, _config=None: model.native,
)


@contextmanager
def one_layer_family() -> Iterator[None]:
    """Makes `OneLayer` a supported model inside the block."""
    FAMILIES["OneLayer"] = __name__
    try:
        yield
    finally:
        del FAMILIES["OneLayer"]


@torch.no_grad()
def attend(method: Method, layout: Layout, q: Tensor, k: Tensor, v: Tensor, **model: Any) -> Tensor:
    """Attention of q, k, v [B, S, H, D] under a method that was applied to a model; [B, S, H, D]."""
    heads, head_dim = q.shape[2:]
    with one_layer_family():
        layer = OneLayer(heads, head_dim, **model)
        handle = gensparse.apply(layer, method, strict=True)
        out = layer(torch.cat([x.flatten(2) for x in (q, k, v)], -1), layout, 0.5)
        assert handle.report()["calls"] == {"sparse": 1, "dense": {}}
    return out.unflatten(-1, (heads, head_dim))
