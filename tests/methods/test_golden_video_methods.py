"""Published vectors through applied methods: folders radial, psa, agentsd, and the results of ptdit and hybrids.

What a file holds as queries, keys and values, or as the input and weights of a layer, goes through a diffusers
attention module on which the method was put with `gensparse.apply`; what the module gives is compared with the file.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from golden_files import GoldenError, folder_files, golden_params, golden_root, load
from one_layer import OneLayer, attend, one_layer_family
from safetensors.torch import save_file
from test_golden_geometry import listed_blocks, radial_case
from test_golden_pooled import axes, cases
from test_golden_routed import pyramid, pyramid_oracle
from torch import Tensor, nn

import gensparse
from gensparse.attention import sparse_attention
from gensparse.errors import ModelError
from gensparse.families import FAMILIES
from gensparse.families.base import Family
from gensparse.kernels import reference, route
from gensparse.layout import Layout
from gensparse.methods import PSA, START, AgentSD, At, BiFormer, HiLo, Method, Proxy, Radial
from gensparse.methods.ptdit import PTDiT, PTDiTBlock, load_strictly
from gensparse.patterns import PyramidBlocks
from gensparse.plan import RouteContext, build_plan
from gensparse.processors.agents import AgentAttention, agent_attention, match
from gensparse.processors.operators import OperatorCall

FOLDERS = ("radial", "psa", "agentsd", "ptdit", "hybrids")
KINDS = (
    "blocks", "attention", "levels", "importance", "caps", "gilbert", "layer", "core", "block", "tiny_model",
    "pooled_kv", "hilo", "biformer",
)  # fmt: skip
DENSE_TOKENS = 4096  # masks of more tokens are compared by blocks of the plan
ATOL = 1e-5
BLOCK_ATOL = 1e-4  # for whole blocks and models


def close(got: Tensor, expected: np.ndarray, atol: float = ATOL) -> None:
    assert tuple(got.shape) == expected.shape
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=atol)


def heads_last(arrays: dict, names: str = "qkv") -> list[Tensor]:
    """Tensors [B, S, H, D] of arrays [B, heads, S, D]."""
    return [torch.from_numpy(arrays[name]).transpose(1, 2) for name in names]


def noise(layout: Layout, heads: int = 1, dim: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(layout.tokens)
    return [torch.randn(1, layout.tokens, heads, dim, generator=generator) for _ in range(3)]


# ----------------------------------------------------------------------------------------------------------- radial
def check_radial(file: Path, arrays: dict) -> None:
    """Results under the official mask: those of the file, or of its mask on random tensors; large masks by blocks."""
    own, layout = radial_case(file, arrays)
    method = Radial(own.decay, own.block, own.sink, dense_steps=0, dense_layers=0, rule=own.rule)
    mask, block = arrays["block_mask"], own.block
    if layout.tokens > DENSE_TOKENS:
        tile = next(n for n in (256, 128, 64, 32) if block % n == 0)
        plan = build_plan(method.pattern(layout), layout, q_tile=tile, k_tile=tile)
        np.testing.assert_array_equal(listed_blocks(plan, block)[: len(mask), : len(mask)], mask)
        return
    tensors = heads_last(arrays) if "q" in arrays else noise(layout)
    out = attend(method, layout, *tensors)
    if "out" in arrays:
        close(out.transpose(1, 2), arrays["out"])
    # the upstream rule has no block for the last tokens that fill none
    edges = np.minimum(np.arange(len(mask) + 1) * block, layout.tokens)
    allowed = np.zeros((layout.tokens, layout.tokens), bool)
    allowed[: edges[-1], : edges[-1]] = mask.repeat(np.diff(edges), axis=0).repeat(np.diff(edges), axis=1)
    expected = reference.attend(*tensors, torch.from_numpy(allowed)[None])[0]
    close(out[:, : edges[-1]], expected[:, : edges[-1]].numpy())


# -------------------------------------------------------------------------------------------------------------- psa
def psa(pattern: PyramidBlocks, **changes: Any) -> PSA:
    """The method with the settings of a pattern."""
    names = ("block", "query_block", "ends", "mode", "caps", "order", "pad", "tile")
    return PSA(**{name: getattr(pattern, name) for name in names} | changes)


@dataclass(frozen=True, eq=False)
class GivenLevels:
    """Attention by the plan of a method, with the levels of a file instead of chosen ones."""

    method: Method
    levels: np.ndarray

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: OperatorCall) -> Tensor:
        plan = build_plan(self.method.pattern(call.layout), call.layout)
        return sparse_attention(q, k, v, plan, scale=call.scale, ctx=plan.choice(torch.from_numpy(self.levels)))

    def key(self) -> str:
        return "given levels"


@dataclass(frozen=True)
class ByLevels(PSA):
    """PSA that takes the levels of a file."""

    levels: Any = None

    def pattern(self, layout: Layout, at: At = START) -> Any:
        own = super().pattern(layout, at)
        return GivenLevels(psa(own), self.levels)


def check_psa_outputs(arrays: dict) -> None:
    own = psa(pyramid(arrays, pad="replicate"))
    settings = {field.name: getattr(own, field.name) for field in fields(own)}
    method = ByLevels(**settings, levels=arrays["levels"])
    out = attend(method, Layout.joint((1, 1, arrays["q"].shape[2])), *heads_last(arrays))
    close(out.transpose(1, 2), arrays["out"])


def check_psa_levels(arrays: dict) -> None:
    pattern = psa(pyramid(arrays)).pattern(Layout.joint((1, 1, 64)))
    levels = route.pyramid_levels(torch.from_numpy(arrays["importance"]), pattern.ends, pattern.mode, pattern.align)
    np.testing.assert_array_equal(levels.numpy(), arrays["levels"])


def check_psa_chosen(arrays: dict) -> None:
    """Queries and keys of a file; the levels are those its own samples give, the rest is the written definition."""
    caps = tuple(np.round(arrays["thresholds"].tolist(), 6)) if "thresholds" in arrays else None
    k = heads_last(arrays, "k")[0]
    q = heads_last(arrays, "q")[0] if "q" in arrays else k.flip(1)
    method = psa(pyramid(arrays, pad="replicate", caps=caps), ends=(0.3, 0.6, 0.8, 0.9), seed=3)
    layout = Layout.joint((1, 1, k.shape[1]))
    plan = build_plan(method.pattern(layout), layout)
    levels = plan.levels(q, k, RouteContext(seed=3)).numpy()
    assert len(np.unique(levels)) > 2
    expected = pyramid_oracle(q, k, k, levels, method.query_block, method.block)
    close(attend(method, layout, q, k, k), expected.numpy())


def check_gilbert(arrays: dict) -> None:
    layout = Layout.joint(tuple(int(arrays[name]) for name in ("depth", "height", "width")))
    cut = PSA(order="gilbert").pattern(layout).cut(layout)
    np.testing.assert_array_equal(cut.order, arrays["order"])


# ---------------------------------------------------------------------------------------------------------- agentsd
class Block(nn.Module):
    """One transformer block of a UNet; the file's tensors are its input, and what its norm gives."""

    def __init__(self, arrays: dict, heads: int) -> None:
        super().__init__()
        dim = arrays["hidden"].shape[-1]
        block = BasicTransformerBlock(dim, heads, dim // heads, cross_attention_dim=None)
        block.norm1 = Fixed(torch.from_numpy(arrays["normed"]))
        block.attn1.load_state_dict(
            {name.removeprefix("w."): torch.from_numpy(x) for name, x in arrays.items() if name.startswith("w.")}
        )
        self.transformer_blocks = nn.ModuleList([block])

    def forward(self, hidden_states: Tensor, layout: Layout, timestep: float) -> Tensor:
        found: list[Tensor] = []
        (block,) = self.transformer_blocks
        with block.attn1.register_forward_hook(lambda _module, _args, out: found.append(out)):
            block(hidden_states)
        return found[0]


class Fixed(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, x: Tensor) -> Tensor:
        return self.value


FAMILY = Family(
    name="UNet",
    sites=lambda _model, _names: {"transformer_blocks.0.attn1": "level0"},
    read_layouts=lambda _model, bound, _memo: {"level0": bound["layout"]},
    layout_for=lambda height, width: Layout.image(height, width),
    native_tokens=lambda _model, _config=None: 4096,
)


@contextmanager
def block_family() -> Iterator[None]:
    FAMILIES["Block"] = __name__
    try:
        yield
    finally:
        del FAMILIES["Block"]


@dataclass(frozen=True)
class GivenAgents(AgentAttention):
    """AgentSD's attention with the destinations of a file."""

    dst: tuple[int, ...] = ()

    def destinations(self, call: OperatorCall, device: Any) -> Tensor:
        return torch.tensor(self.dst, device=device)


@dataclass(frozen=True)
class GivenSD(AgentSD):
    dst: tuple[int, ...] = ()

    def pattern(self, layout: Layout, at: At = START) -> GivenAgents:
        own = super().pattern(layout, at)
        return GivenAgents(**{field.name: getattr(own, field.name) for field in fields(own)}, dst=self.dst)


@torch.no_grad()
def check_agents(arrays: dict) -> None:
    params = json.loads(str(arrays["params"]))
    layout, cell = Layout.image(params["h"], params["w"]), (params["sy"], params["sx"])
    settings = {name: params[name] for name in ("ratio", "agent_ratio", "k_scale2", "k_shortcut", "metric")}
    own = AgentSD(**settings, cell=cell, early_steps=1, random=params["use_rand"])
    operator, dst = own.pattern(layout), tuple(arrays["dst_index"].tolist())
    assert isinstance(operator, AgentAttention)
    merged, agents = operator.counts(layout.tokens, len(dst))
    assert merged == min(params["r"], layout.tokens - len(dst))
    assert layout.tokens - merged == int(arrays["n_merged"])
    assert (-1 if agents is None else layout.tokens - agents) == int(arrays["n_agents"])

    normed, hidden = (torch.from_numpy(arrays[name]) for name in ("normed", "hidden"))
    found = match(hidden if params["metric"] == "hidden" else normed, torch.tensor(dst))
    merging = found.merging(merged)
    close(merging.unmerge(merging.merge(normed)), arrays["merge_unmerge"])
    if "agents_sorted_by_dst" in arrays:
        close(found.merging(agents).merge(normed), arrays["agents_sorted_by_dst"])

    # destinations are drawn from another stream than the authors'; without one they are the same
    method: AgentSD = GivenSD(**settings, cell=cell, early_steps=1, dst=dst) if params["use_rand"] else own
    with block_family():
        model = Block(arrays, params["heads"])
        handle = gensparse.apply(model, method, strict=True)
        close(model(hidden, layout, 1.0), arrays["out"])
        assert handle.report()["calls"] == {"sparse": 1, "dense": {}}


def check_core(arrays: dict) -> None:
    for case in cases(arrays):
        q, k, v, agents, _ = (torch.from_numpy(case[name]).transpose(1, 2) for name in ("q", "k", "v", "agent", "out"))
        out = agent_attention(
            q, k, v, agents, own=v, sharpness=float(case["k_scale2"]), shortcut=float(case["k_shortcut"])
        )
        close(out.transpose(1, 2), case["out"])


# ------------------------------------------------------------------------------------------------------------ ptdit
def stored_weights(arrays: dict, folder: Path) -> Path:
    file = folder / "weights.safetensors"
    weights = {name.removeprefix("w."): x for name, x in arrays.items() if name.startswith("w.")}
    save_file({name: torch.from_numpy(x).contiguous() for name, x in weights.items()}, file)
    return file


@torch.no_grad()
def check_block(arrays: dict, folder: Path) -> None:
    """One block; every published name of its weights and no other is loaded."""
    window, x = axes(arrays["compress_ratios"]), torch.from_numpy(arrays["x"])
    dim = x.shape[-1]
    block = PTDiTBlock(dim, int(arrays["heads"]), window=window, proxy_window=window, context=arrays["text"].shape[-1])
    load_strictly(block, stored_weights(arrays, folder))
    grid = tuple(x.shape[1:4])
    text, mask, modulation = (torch.from_numpy(arrays[name]) for name in ("text", "text_mask", "timestep6"))
    out = block(x.flatten(1, 3), grid, text, (1 - mask) * -10000.0, modulation)
    close(out.unflatten(1, grid), arrays["y"], BLOCK_ATOL)


@torch.no_grad()
def check_tiny_model(arrays: dict, folder: Path) -> None:
    config, file = json.loads(str(arrays["config"])), stored_weights(arrays, folder)
    model = PTDiT(**config)
    with pytest.raises(ModelError, match=rf"transformer_blocks\.{config['num_layers']}\.attn1\.to_k\.bias is missing"):
        PTDiT(**config | {"num_layers": config["num_layers"] + 1}).load_checkpoint(file)
    model.load_checkpoint(file)
    x, t, text, mask = (torch.from_numpy(arrays[name]) for name in ("x", "t", "text", "text_mask"))
    close(model(x, t, text, mask).sample, arrays["y"], BLOCK_ATOL)
    assert set(model.state_dict()) == {name.removeprefix("w.") for name in arrays if name.startswith("w.")}


def check_pooled_kv(arrays: dict) -> None:
    for case in cases(arrays):
        params = json.loads(str(case["params"]))
        layout = Layout.joint(tuple(params["fhw"]), text=params["text"])
        method = Proxy(tuple(params["win"]), alternate=False)
        close(attend(method, layout, *heads_last(case)).transpose(1, 2), case["out"])


# ---------------------------------------------------------------------------------------------------------- hybrids
@torch.no_grad()
def through_layer(method: Method, layout: Layout, x: Tensor, heads: int, weights: dict[str, Tensor]) -> Tensor:
    """An attention layer with weights of a file, under a method."""
    dim = x.shape[-1]
    with one_layer_family():
        model = OneLayer(heads, dim // heads)
        attn = model.get_submodule(model.name)
        for name in ("to_q", "to_k", "to_v"):
            setattr(attn, name, nn.Linear(dim, dim))
        attn.to_out[0] = nn.Linear(dim, dim)
        attn.load_state_dict(weights)
        handle = gensparse.apply(model, method, strict=True)
        out = model(x, layout, 0.5)
        assert handle.report()["calls"] == {"sparse": 1, "dense": {}}
    return out


def check_hilo(arrays: dict) -> None:
    """The paper's projections per kind of head as those of one layer: high heads first, then low ones."""
    params = json.loads(str(arrays["params"]))
    heads, dim = params["heads"], params["dim"]
    low = int(params["alpha"] * heads) * (dim // heads)
    weights = {}
    for part in ("weight", "bias"):
        high_q, high_k, high_v = torch.from_numpy(arrays[f"w.h_qkv.{part}"]).split(dim - low)
        low_k, low_v = torch.from_numpy(arrays[f"w.l_kv.{part}"]).split(low)
        low_q = torch.from_numpy(arrays[f"w.l_q.{part}"])
        for name, pair in (("q", (high_q, low_q)), ("k", (high_k, low_k)), ("v", (high_v, low_v))):
            weights[f"to_{name}.{part}"] = torch.cat(pair)
    high, own = (torch.from_numpy(arrays[f"w.{name}_proj.weight"]) for name in "hl")
    weights["to_out.0.weight"] = torch.block_diag(high, own)
    weights["to_out.0.bias"] = torch.cat([torch.from_numpy(arrays[f"w.{name}_proj.bias"]) for name in "hl"])
    method = HiLo(params["ws"], params["alpha"])
    layout = Layout.image(params["H"], params["W"])
    close(through_layer(method, layout, torch.from_numpy(arrays["x"]), heads, weights), arrays["y"])


def check_biformer(arrays: dict) -> None:
    params = json.loads(str(arrays["params"]))
    weights = {}
    for part in ("weight", "bias"):
        for name, x in zip("qkv", torch.from_numpy(arrays[f"w.qkv.qkv.{part}"]).chunk(3), strict=True):
            weights[f"to_{name}.{part}"] = x
        weights[f"to_out.0.{part}"] = torch.from_numpy(arrays[f"w.wo.{part}"])
    method = BiFormer((params["n_win"],) * 2, params["topk"], own=False)
    layout, x = Layout.image(params["H"], params["W"]), torch.from_numpy(arrays["x"]).flatten(1, 2)
    out = through_layer(method, layout, x, params["heads"], weights)
    close(out.unflatten(1, (params["H"], params["W"])), arrays["y"])
    q, k = (torch.nn.functional.linear(x, weights[f"to_{n}.weight"], weights[f"to_{n}.bias"]) for n in "qk")
    plan = build_plan(method.pattern(layout), layout)
    choice = plan.select(*(x.unflatten(-1, (params["heads"], -1)) for x in (q, k)))
    np.testing.assert_array_equal(choice.index[:, 0].numpy(), arrays["route_index"])


def check(file: Path, folder: Path) -> None:
    kind, arrays = load(file)
    match file.parent.name, kind:
        case "radial", _:
            check_radial(file, arrays)
        case "psa", "attention":
            check_psa_outputs(arrays)
        case "psa", "levels":
            check_psa_levels(arrays)
        case "psa", "importance" | "caps":
            check_psa_chosen(arrays)
        case "psa", "gilbert":
            check_gilbert(arrays)
        case "agentsd", "layer":
            check_agents(arrays)
        case "agentsd", "core":
            check_core(arrays)
        case "ptdit", "block":
            check_block(arrays, folder)
        case "ptdit", "tiny_model":
            check_tiny_model(arrays, folder)
        case "ptdit", "pooled_kv":
            check_pooled_kv(arrays)
        case "hybrids", "hilo":
            check_hilo(arrays)
        case "hybrids", "biformer":
            check_biformer(arrays)
        case _:
            raise GoldenError(f"{file}: no check for kind {kind}")


def published() -> list:
    """Parameters for every file with results, and for every file that no schema knows."""
    return golden_params(*FOLDERS, kinds=KINDS)


@pytest.mark.parametrize("file", published())
def test_applied_methods_give_the_published_results(file: Path, tmp_path: Path) -> None:
    check(file, tmp_path)


def failing(file: Path, folder: Path) -> bool:
    try:
        check(file, folder)
    except AssertionError:  # a GoldenError is one
        return True
    return False


def test_unknown_files_and_arrays_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, work = tmp_path / "golden", tmp_path / "work"
    work.mkdir()
    for folder in FOLDERS:  # the smallest file of each is known, and enough
        path = min(folder_files(folder), key=lambda path: path.stat().st_size)
        copy = root / path.relative_to(golden_root())
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    monkeypatch.setenv("GENSPARSE_GOLDEN", str(root))
    assert not any(failing(*param.values, work) for param in published())
    np.savez(root / "ptdit" / "planted.npz", mystery=np.zeros(3))
    victim = folder_files("agentsd", root)[0]
    np.savez(victim, **dict(np.load(victim)) | {"mystery": np.zeros(1)})
    (root / "psa" / "planted.json").write_text("{}")
    failed = {param.id for param in published() if failing(*param.values, work)}
    assert failed == {f"golden-{name}" for name in ("ptdit-planted.npz", f"agentsd-{victim.name}", "psa-planted.json")}


def test_results_of_another_metric_are_not_taken_for_the_published_ones() -> None:
    for path in golden_params("agentsd", kinds=("layer",)):
        _, arrays = load(path.values[0])
        params = json.loads(str(arrays["params"]))
        wrong = params | {"metric": "normed" if params["metric"] == "hidden" else "hidden"}
        with pytest.raises(AssertionError):
            check_agents(arrays | {"params": np.array(json.dumps(wrong))})
