"""One cross-attention module of diffusers with given weights, as a site whose stages a test decides."""

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from torch import Tensor

from gensparse.processors.site import Action, ActionSlot
from gensparse.processors.stages import CrossSite, Stages
from gensparse.processors.variant import SITE, make_dense, make_sparse

WEIGHTS = {
    "to_q.weight": "to_q",
    "to_k.weight": "to_k",
    "to_v.weight": "to_v",
    "to_out.0.weight": "to_out_w",
    "to_out.0.bias": "to_out_b",
}


def module(data: dict[str, Tensor], adapters: list[dict[str, Tensor]] | None = None, scales: Any = None) -> Attention:
    """Cross attention with the weights of a file, and image adapters with `image_tokens`, `to_k_ip` and `to_v_ip`."""
    width, heads = data["to_q"].shape[0], int(data["heads"])
    attn = Attention(data["to_q"].shape[1], data["to_k"].shape[1], heads=heads, dim_head=width // heads)
    state = {name: data[key] for name, key in WEIGHTS.items()}
    if adapters is not None:
        tokens = [entry["image_tokens"].shape[-2] for entry in adapters]
        attn.set_processor(IPAdapterAttnProcessor2_0(width, data["to_k"].shape[1], num_tokens=tokens, scale=scales))
        for index, entry in enumerate(adapters):
            state |= {f"processor.to_{x}_ip.{index}.weight": entry[f"to_{x}_ip"] for x in "kv"}
    attn.load_state_dict(state)
    return attn.eval()


@torch.no_grad()
def staged(
    attn: Attention, stages: Stages | None, hidden: Tensor, context: Any, notes: Any = None, **arguments: Any
) -> Tensor:
    """The output of a module under stages; None is the module's own processor."""
    plain = type(attn.processor)
    if stages is None:
        return attn(hidden, encoder_hidden_states=context, **arguments)
    slot = ActionSlot()
    slot.put(Action(stages=stages))
    site = CrossSite("attn2", slot)
    site.notes = notes
    setattr(attn, SITE, site)
    make_sparse(attn.processor)
    try:
        return attn(hidden, encoder_hidden_states=context, **arguments)
    finally:
        make_dense(attn.processor)
        delattr(attn, SITE)
        assert type(attn.processor) is plain
