"""Image prompts: published results through diffusers' processor, alone and as our sparse variant of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from golden_files import GoldenError, golden_params, load
from torch import Tensor

from gensparse.processors.site import Site
from gensparse.processors.variant import SITE, make_dense, make_sparse

ATOL = 2e-5  # said by the folder's README


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def module(data: dict[str, Tensor], adapters: list[dict[str, Tensor]], scales: list[Any]) -> Attention:
    """Cross attention with the weights of the file and one adapter per entry of `adapters`."""
    width, heads = data["to_q"].shape[0], int(data["heads"])
    attn = Attention(data["to_q"].shape[1], data["to_k"].shape[1], heads=heads, dim_head=width // heads)
    tokens = [entry["image_tokens"].shape[-2] for entry in adapters]
    processor = IPAdapterAttnProcessor2_0(width, data["to_k"].shape[1], num_tokens=tokens, scale=scales)
    attn.set_processor(processor)
    weights = {"to_q.weight": "to_q", "to_k.weight": "to_k", "to_v.weight": "to_v"}
    weights |= {"to_out.0.weight": "to_out_w", "to_out.0.bias": "to_out_b"}
    state = {name: data[key] for name, key in weights.items()}
    for index, entry in enumerate(adapters):
        state |= {f"processor.to_{x}_ip.{index}.weight": entry[f"to_{x}_ip"] for x in "kv"}
    attn.load_state_dict(state)
    return attn.eval()


@torch.no_grad()
def both(attn: Attention, data: dict[str, Tensor], images: list[Tensor], masks: list[Tensor] | None) -> list[Tensor]:
    """The output of the plain processor and that of its sparse variant, in a module that is no site."""
    outs = []
    for sparse in (False, True):
        if sparse:
            setattr(attn, SITE, Site("attn2", None))
            make_sparse(attn.processor)
        outs.append(attn(data["hidden"], encoder_hidden_states=(data["text"], images), ip_adapter_masks=masks))
    make_dense(attn.processor)
    assert type(attn.processor) is IPAdapterAttnProcessor2_0
    return outs


def adapters_of(data: dict[str, Tensor], path: Path) -> list[dict[str, Tensor]]:
    """Arrays NAME_j of every adapter j, in order; each has all of them."""
    numbers = sorted({int(name.rpartition("_")[2]) for name in data if name.startswith("image_tokens_")})
    names = ("image_tokens", "mask", "to_k_ip", "to_v_ip")
    found = [{name: data[f"{name}_{j}"] for name in names if f"{name}_{j}" in data} for j in numbers]
    if numbers != list(range(len(numbers))) or any(len(entry) != len(names) for entry in found):
        raise GoldenError(f"{path}: adapters {numbers} lack arrays")
    return found


@pytest.mark.parametrize("path", golden_params("ip-adapter"))
def test_image_prompts_give_the_published_result(path: Path) -> None:
    kind, arrays = load(path)
    data = tensors(arrays)
    if kind == "decoupled":
        for scale, expected in ((float(data["scale"]), "expected"), (0.0, "expected_scale0")):
            attn = module(data, [data], [scale])
            for out in both(attn, data, [data["image_tokens"][:, None]], None):
                torch.testing.assert_close(out, data[expected], atol=ATOL, rtol=0)
        return
    adapters = adapters_of(data, path)
    images = [entry["image_tokens"] for entry in adapters]
    scales = [row[~row.isnan()].tolist() for row in data["scales"]]
    for out in both(module(data, adapters, scales), data, images, [entry["mask"] for entry in adapters]):
        torch.testing.assert_close(out, data["expected_masked"], atol=ATOL, rtol=0)
    if "expected_unmasked" in data:
        attn = module(data, adapters, [row[0] for row in scales])
        for out in both(attn, data, images, None):
            torch.testing.assert_close(out, data["expected_unmasked"], atol=ATOL, rtol=0)
