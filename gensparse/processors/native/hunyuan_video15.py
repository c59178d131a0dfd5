"""HunyuanVideo 1.5 without a mask of token pairs.

diffusers' processor hides padding by a mask [B, 1, N, N], made in every layer: 10 GB for 100,000 tokens. Tokens that
count see the same keys through a mask of keys. Only queries of padding differ, which nobody sees: they see the keys of
all valid tokens instead of none.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gensparse.processors import _compat

dispatch_attention_fn = _compat.dispatcher()
_rotated = _compat.rotary()


def call(
    self: Any,
    attn: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention over the clip and then the text.

    Args:
        hidden_states: clip [B, N, C]; encoder_hidden_states: text [B, T, C], valid tokens before padding.
        attention_mask: [B, T], not 0 for valid text; None hides nothing.
        image_rotary_emb: cos and sin of the clip's positions.
    """
    q = attn.norm_q(_heads(attn, attn.to_q(hidden_states)))
    k = attn.norm_k(_heads(attn, attn.to_k(hidden_states)))
    v = _heads(attn, attn.to_v(hidden_states))
    if image_rotary_emb is not None:
        q, k = _rotated(q, image_rotary_emb), _rotated(k, image_rotary_emb)
    if encoder_hidden_states is not None:
        words = _text(attn, encoder_hidden_states)
        q, k, v = (torch.cat(pair, dim=1) for pair in zip((q, k, v), words, strict=True))
    mask = None if attention_mask is None else _key_mask(attention_mask, k.shape[1])
    out = dispatch_attention_fn(q, k, v, attn_mask=mask, **_compat.dispatch_options(self))
    out = out.flatten(2).to(q.dtype)
    if encoder_hidden_states is None:
        return out, None
    clip, text = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
    return attn.to_out[1](attn.to_out[0](clip)), attn.to_add_out(text)


def _heads(attn: nn.Module, tokens: Tensor) -> Tensor:
    """[B, S, H D] -> [B, S, H, D]."""
    return tokens.unflatten(2, (attn.heads, -1))


def _text(attn: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of text tokens, [B, T, H, D] each."""
    q, k, v = (_heads(attn, layer(tokens)) for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
    q = q if attn.norm_added_q is None else attn.norm_added_q(q)
    return q, k if attn.norm_added_k is None else attn.norm_added_k(k), v


def _key_mask(valid: Tensor, keys: int) -> Tensor:
    """bool [B, 1, 1, keys] from the mask of the last of them [B, T]; all others are visible."""
    return F.pad(valid.bool(), (keys - valid.shape[1], 0), value=True)[:, None, None]
