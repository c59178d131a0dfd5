"""Published cross-attention of several subjects, through the processors that users get.

Folders mip-adapter, autostudio, structured-diffusion, lpa, ip-adapter and regional-prompting: the parts that are
attention to text and image prompts.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from cross_layer import module, staged
from golden_files import GoldenError, folder_files, golden_params, load
from torch import Tensor

from gensparse.methods.autostudio import drawn
from gensparse.processors.stages import Call, Couple, Drawer, Merge, Phrases, Stages, Words
from gensparse.subjects.drawer import layout_weights, on_grid
from gensparse.subjects.merge import gate, relevance, shares
from gensparse.subjects.phrases import aligned
from gensparse.subjects.regions import couple_weights

ATOL = 2e-5  # said by the folders' READMEs

CHECKED = {
    "mip-adapter": ("weighted_merge",),
    "autostudio": ("parallel_attention",),
    "structured-diffusion": ("attention",),
    "lpa": ("attention",),
    "ip-adapter": ("decoupled", "multi_masked"),
    "regional-prompting": ("unet_couple",),
}
# known files of the same folders that other tests check
OTHERS = {
    "autostudio": ("layout", "latent_blend"),
    "structured-diffusion": ("spans",),
    "lpa": ("parse", "schedule"),
    "regional-prompting": ("flux_mask", "multidiffusion", "boxdiff"),
}

Arrays = dict[str, Tensor]


def tensors(arrays: dict[str, np.ndarray]) -> Arrays:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def close(got: Tensor, expected: Tensor, atol: float = ATOL) -> None:
    torch.testing.assert_close(got, expected.to(got.dtype), atol=atol, rtol=0)


def adapter(data: Arrays) -> list[Arrays]:
    return [{name: data[name] for name in ("image_tokens", "to_k_ip", "to_v_ip")}]


def heads_of(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    return (x @ weight.T).unflatten(-1, (heads, -1))


def check_weighted_merge(data: Arrays) -> None:
    images = data["image_tokens"]
    merge = Merge(data["entity_text"], None, data["entity_token_len"])
    stages = Stages(images=merge)
    attn = module(data, adapter(data), [float(data["scale"])])
    context = (data["text"], [images])
    close(staged(attn, stages, data["hidden"], context, data["text_to_weight"]), data["expected"])
    zeros = torch.zeros_like(data["text_to_weight"])
    close(staged(attn, stages, data["hidden"], context, zeros), data["expected_text_weight_one"])
    close(staged(attn, stages, data["hidden"], context), data["expected_text_weight_one"])  # no weight in the file

    heads, count = int(data["heads"]), images.shape[1]
    q = heads_of(data["hidden"], data["to_q"], heads)
    found = [
        relevance(q, heads_of(data["entity_text"][:, k], data["to_k"], heads), data["entity_token_len"][:, k])
        for k in range(count)
    ]
    raw = torch.stack(found, 1)
    close(raw, data["expected_relevance_raw"])
    close(shares(raw), data["expected_relevance"])
    k, v = (heads_of(data["text"], data[name], heads) for name in ("to_k", "to_v"))
    text = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    close(gate(text.flatten(2), data["text_to_weight"].flatten()), data["expected_text_weight"])

    one = Stages(images=merge)  # objects in another order, with their names
    order = torch.arange(count).flip(0)
    other = Merge(data["entity_text"][:, order], None, data["entity_token_len"][:, order])
    permuted = staged(attn, Stages(images=other), data["hidden"], (data["text"], [images[:, order]]), zeros)
    close(permuted, staged(attn, one, data["hidden"], context, zeros))


def check_parallel_attention(data: Arrays) -> None:
    grid, size = tuple(data["grid"].tolist()), tuple(data["image_size"].tolist())
    fuse = tuple(data["fuse_scale"].tolist())
    weights = layout_weights(data["boxes_xywh"].tolist(), size, fuse)
    close(on_grid(weights, grid), data["expected_layout_resized"])
    layers = weights.shape[1]
    texts = [data["text"][m : m + 1] for m in range(2 * layers)]
    present = tuple(bool(flag) for flag in data["have_ref"])
    couple, images = drawn(weights, grid, tuple(texts[:layers]), tuple(texts[layers:]), present, lead=2)
    attn = module(data, adapter(data), [float(data["scale"])])
    # the files have the conditional half first, diffusers has it last
    hidden = data["hidden"].flip(0)
    pictures = data["image_tokens"].unflatten(0, (2, layers)).flip(0)
    context = torch.cat([texts[-1], texts[0]])
    on = staged(attn, Stages(True, grid, couple=couple, images=images), hidden, (context, [pictures]))
    close(on.flip(0), data["expected"])
    off = staged(attn, Stages(True, grid, images=Drawer(None)), hidden, (context, [pictures]))
    close(off.flip(0), data["expected_switched_off"])


def check_structured(data: Arrays) -> None:
    encodings, spans = data["encodings"], [tuple(span) for span in data["spans"].tolist()]
    full, phrases = encodings[0], encodings[1:]
    assert spans[0][0] == 0
    for text, span, expected in zip(encodings, spans, data["expected_values"], strict=True):
        own = (
            full.clone()
            if torch.equal(text, full)
            else torch.stack([aligned(full[b : b + 1], text[b : b + 1], span)[0] for b in range(len(full))])
        )
        assert torch.equal(own, expected)
    prompts = len(full)
    attn, context = module(data), torch.cat([data["uncond"], full])
    outs = {}
    for mode in ("values", "keys"):
        stage = Phrases((tuple(spans[1:]),) * prompts, tuple(phrases[:, b] for b in range(prompts)), mode)
        outs[mode] = staged(attn, Stages(True, phrases=stage), data["hidden"], context)
    close(outs["values"], data["expected"])
    close(outs["keys"], data["expected_conjunction"])
    # the released code aliases its first key; the written definition is followed, and the file tells them apart
    assert (outs["keys"] - data["expected_conjunction_as_released"]).abs().max() > 10 * ATOL


def check_words(data: Arrays) -> None:
    attn = module(data)
    for mode, expected in (("zero", "expected_zeroed"), ("mask", "expected_hard_mask")):
        stages = Stages(words=Words(data["dropped"][None], mode))
        close(staged(attn, stages, data["hidden"], data["text"]), data[expected])
    off = staged(attn, Stages(), data["hidden"], data["text"])
    close(off, data["expected_off"])
    assert torch.equal(off, staged(attn, None, data["hidden"], data["text"]))


def check_couple(data: Arrays) -> None:
    grid = tuple(data["grid"].tolist())
    weights = couple_weights(data["region_masks"], float(data["base_weight"]), grid)
    close(weights, data["expected_weights"], 1e-6)
    texts = [data[f"region_text_{number}"] for number in range(len(weights) - 1)]
    if sum(name.startswith("region_text_") for name in data) != len(texts):
        raise GoldenError("the region texts are not numbered from 0")
    context = torch.cat([data["uncond"], data["base_text"]])
    stages = Stages(True, grid, couple=Couple(weights, (None, *texts)))
    close(staged(module(data), stages, data["hidden"], context), data["expected"])
    order = list(range(len(texts)))[::-1]
    flipped = Couple(weights[[0, *(n + 1 for n in order)]], (None, *(texts[n] for n in order)))
    close(staged(module(data), Stages(True, grid, couple=flipped), data["hidden"], context), data["expected"])


def check_image_prompts(data: Arrays) -> None:
    """Nothing enabled: the processor's own result, bit for bit, and the published one."""
    masked = "image_tokens_0" in data
    numbers = range(sum(name.startswith("image_tokens_") for name in data)) if masked else [None]
    each = [
        {name: data[name if j is None else f"{name}_{j}"] for name in ("image_tokens", "to_k_ip", "to_v_ip")}
        for j in numbers
    ]
    scales = [row[~row.isnan()].tolist() for row in data["scales"]] if masked else [float(data["scale"])]
    attn = module(data, each, scales)
    images = [entry["image_tokens"] for entry in each] if masked else [data["image_tokens"][:, None]]
    more = {"ip_adapter_masks": [data[f"mask_{j}"] for j in numbers]} if masked else {}
    out = staged(attn, Stages(), data["hidden"], (data["text"], images), **more)
    assert torch.equal(out, staged(attn, None, data["hidden"], (data["text"], images), **more))
    close(out, data["expected_masked" if masked else "expected"])
    if not masked:
        attn = module(data, each, [0.0])
        close(staged(attn, Stages(), data["hidden"], (data["text"], images)), data["expected_scale0"])
    elif "expected_unmasked" in data:
        attn = module(data, each, [row[0] for row in scales])
        close(staged(attn, Stages(), data["hidden"], (data["text"], images)), data["expected_unmasked"])


CHECKS = {
    ("mip-adapter", "weighted_merge"): check_weighted_merge,
    ("autostudio", "parallel_attention"): check_parallel_attention,
    ("structured-diffusion", "attention"): check_structured,
    ("lpa", "attention"): check_words,
    ("ip-adapter", "decoupled"): check_image_prompts,
    ("ip-adapter", "multi_masked"): check_image_prompts,
    ("regional-prompting", "unet_couple"): check_couple,
}


@pytest.mark.parametrize(
    "file", [param for folder, kinds in CHECKED.items() for param in golden_params(folder, kinds=kinds)]
)
def test_published_cross_attention(file: Path) -> None:
    kind, arrays = load(file)
    if (file.parent.name, kind) not in CHECKS:
        raise GoldenError(f"{file}: no check for kind {kind}")
    CHECKS[file.parent.name, kind](tensors(arrays))


def test_every_known_kind_is_checked_here_or_elsewhere() -> None:
    for folder in CHECKED:
        for file in folder_files(folder):
            kind, _ = load(file)
            assert kind in CHECKED[folder] + OTHERS.get(folder, ()), file
    assert set(CHECKS) == {(folder, kind) for folder, kinds in CHECKED.items() for kind in kinds}


def test_a_batch_without_halves_is_named() -> None:
    with pytest.raises(Exception, match="no halves"):
        Call(True, None).halves(3)
