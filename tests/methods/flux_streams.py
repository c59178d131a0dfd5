"""FLUX with anchors as a third stream, written out, against which recorded anchors are held."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn
from torch.nn import functional as F

from gensparse.layout import Layout
from gensparse.methods import ScaleDiT
from gensparse.patterns import Anchors

TARGETS = ("norm1.linear", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.2")
SINGLE_TARGETS = ("norm.linear", "proj_mlp", "proj_out", "attn.to_q", "attn.to_k", "attn.to_v")


class Streams:
    """FLUX written out for three streams: text and picture with the plain weights, anchors with those of the LoRA.

    Every layer attends in one call over [text, picture, anchors] under the method's mask of all three.
    """

    def __init__(self, plain: FluxTransformer2DModel, tuned: FluxTransformer2DModel, mask: Tensor) -> None:
        self.plain, self.tuned, self.mask = plain, tuned, mask

    @torch.no_grad()
    def run(self, high: Mapping[str, Any], low: Mapping[str, Any], ratio: int) -> tuple[Tensor, list[Tensor]]:
        """The picture's output, and the anchors after every block."""
        plain, tuned = self.plain, self.tuned
        when, pooled = high["timestep"] * 1000, high["pooled_projections"]
        times = plain.time_text_embed(when, pooled), plain.time_text_embed(when * 0, pooled)
        text = plain.context_embedder(high["encoder_hidden_states"])
        picture, anchors = plain.x_embedder(high["hidden_states"]), tuned.x_embedder(low["hidden_states"])
        low_ids = low["img_ids"] * torch.tensor([1, ratio, ratio])
        rotary = plain.pos_embed(torch.cat([high["txt_ids"], high["img_ids"], low_ids]))
        seen = []
        for name in ("transformer_blocks", "single_transformer_blocks"):
            for own, other in zip(getattr(plain, name), getattr(tuned, name), strict=True):
                run = self.double if name == "transformer_blocks" else self.single
                text, picture, anchors = run(own, other, (text, picture, anchors), times, rotary)
                seen.append(anchors)
        return plain.proj_out(plain.norm_out(picture, times[0])), seen

    def double(self, own: Any, other: Any, streams: Any, times: Any, rotary: Any) -> list[Tensor]:
        parts = [
            (own.norm1_context, own.norm2_context, own.ff_context, own.attn, "add_{}_proj", own.attn.to_add_out),
            (own.norm1, own.norm2, own.ff, own.attn, "to_{}", own.attn.to_out[0]),
            (other.norm1, other.norm2, other.ff, other.attn, "to_{}", other.attn.to_out[0]),
        ]
        temb = (times[0], times[0], times[1])
        normed = [part[0](x, emb=t) for part, x, t in zip(parts, streams, temb, strict=True)]
        heads = []
        for (_, _, _, attn, form, _), (hidden, *_) in zip(parts, normed, strict=True):
            q, k, v = (getattr(attn, form.format(one))(hidden).unflatten(-1, (attn.heads, -1)) for one in "qkv")
            text = form.startswith("add")
            norms = (attn.norm_added_q, attn.norm_added_k) if text else (attn.norm_q, attn.norm_k)
            heads.append((norms[0](q), norms[1](k), v))
        outs = self.attend(heads, rotary)
        found = []
        for x, part, (_, gate, shift, scale, gate_mlp), out in zip(streams, parts, normed, outs, strict=True):
            x = x + gate[:, None] * part[5](out)
            x = x + gate_mlp[:, None] * part[2](part[1](x) * (1 + scale[:, None]) + shift[:, None])
            found.append(x)
        return found

    def single(self, own: Any, other: Any, streams: Any, times: Any, rotary: Any) -> list[Tensor]:
        blocks, temb = (own, own, other), (times[0], times[0], times[1])
        normed = [block.norm(x, emb=t) for block, x, t in zip(blocks, streams, temb, strict=True)]
        heads = []
        for block, (hidden, _) in zip(blocks, normed, strict=True):
            attn = block.attn
            q, k, v = (getattr(attn, f"to_{one}")(hidden).unflatten(-1, (attn.heads, -1)) for one in "qkv")
            heads.append((attn.norm_q(q), attn.norm_k(k), v))
        outs = self.attend(heads, rotary)
        return [
            x + gate[:, None] * block.proj_out(torch.cat([out, block.act_mlp(block.proj_mlp(hidden))], -1))
            for x, block, (hidden, gate), out in zip(streams, blocks, normed, outs, strict=True)
        ]

    def attend(self, heads: list[tuple[Tensor, Tensor, Tensor]], rotary: Any) -> tuple[Tensor, ...]:
        lengths = [q.shape[1] for q, _, _ in heads]
        q, k, v = (torch.cat(parts, 1) for parts in zip(*heads, strict=True))
        q, k = (apply_rotary_emb(x, rotary, sequence_dim=1) for x in (q, k))
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=self.mask)
        return out.transpose(1, 2).flatten(2).split(lengths, 1)


def all_streams(method: ScaleDiT, high: tuple[int, int], low: tuple[int, int], text: int) -> Tensor:
    layout = Layout.joint((1, *high), text=text, references=[(1, *low)])
    pattern = Anchors(method.window, method.neighbours, method.text_sees_anchors, method.closure)
    return torch.from_numpy(pattern.dense_mask(layout))


def lora(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Factors for the published layers under the published kind of names."""
    generator = torch.Generator().manual_seed(seed)
    paths = ["x_embedder"]
    paths += [f"transformer_blocks.{n}.{part}" for n in range(len(model.transformer_blocks)) for part in TARGETS]
    single = range(len(model.single_transformer_blocks))
    paths += [f"single_transformer_blocks.{n}.{part}" for n in single for part in SINGLE_TARGETS]
    found = {}
    for path in paths:
        layer = model.get_submodule(path)
        for end, shape in (("A", (3, layer.in_features)), ("B", (layer.out_features, 3))):
            found[f"transformer.{path}.lora_{end}.weight"] = torch.randn(shape, generator=generator) * 0.2
    return found


def tuned(model: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """The model with the LoRA fused into its weights."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        found = {key.removeprefix("transformer."): value for key, value in lora(model).items()}
        for key in [key for key in found if "lora_A" in key]:
            twin.get_parameter(key.replace("lora_A.", "")).add_(found[key.replace("lora_A", "lora_B")] @ found[key])
    return twin
