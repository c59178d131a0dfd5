"""AgentSD: what merging and agents do, on which layers and steps, and that removing leaves nothing behind."""

import copy
import pickle
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from families.family_checks import output
from torch import nn

import gensparse
from gensparse.errors import ConfigError, LayoutMismatchError
from gensparse.layout import Layout, Segment
from gensparse.methods import START, AgentSD, Dense, Subject
from gensparse.processors.agents import (
    AgentAttention,
    Merging,
    Seen,
    SiteNotes,
    agent_attention,
    attention,
    destinations,
    match,
    merge_rotated,
)
from gensparse.processors.operators import OperatorCall
from gensparse.testing.tiny import tiny_denoiser, tiny_inputs

SMALL = AgentSD(cell=2, agent_ratio=0.9, max_downsample=4)
MODELS = [("sd15", (1, 9, 6)), ("sdxl", (1, 5, 7)), ("pixart", (1, 7, 8)), ("sd35", (1, 7, 5)), ("flux", (1, 8, 5))]


def operator(method: AgentSD, layout: Layout, step: int = 0) -> AgentAttention:
    found = method.pattern(layout, START._replace(step=step))
    assert isinstance(found, AgentAttention)
    return found


def tensors(batch: int, tokens: int, heads: int = 2, dim: int = 8, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, tokens, heads, dim, generator=generator) for _ in range(3)]


def merging(batch: int = 2, grid: tuple[int, int] = (7, 5), count: int = 12) -> Merging:
    generator = torch.Generator().manual_seed(4)
    metric = torch.randn(batch, grid[0] * grid[1], 6, generator=generator)
    return match(metric, destinations(*grid, (2, 2), (0, 0, 0), "cpu")).merging(count)


# ------------------------------------------------------------------------------------------------------------ parts
def test_untouched_tokens_come_back_as_they_were_and_merged_ones_as_the_mean_of_their_group() -> None:
    own, (x, *_) = merging(), tensors(2, 35)
    back = own.unmerge(own.merge(x))
    for b in range(2):
        groups: dict[int, list[int]] = {int(d): [int(d)] for d in own.dst}
        for token, into in zip(own.merged[b].tolist(), own.into[b].tolist(), strict=True):
            groups[int(own.dst[into])].append(token)
        for members in groups.values():
            torch.testing.assert_close(back[b, members], x[b, members].mean(0).expand(len(members), -1, -1))
        kept = own.kept[b]
        assert torch.equal(back[b, kept], x[b, kept])
        assert sorted([*kept.tolist(), *own.merged[b].tolist(), *own.dst.tolist()]) == list(range(35))


def test_sources_join_the_most_similar_destination_the_most_similar_first(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(1))
    dst = destinations(5, 6, (2, 3), None, "cpu")
    assert dst.tolist() == [0, 3, 12, 15]
    found = match(metric, dst)
    unit = metric / metric.norm(dim=-1, keepdim=True)
    for b in range(2):
        similar = unit[b, found.src[b]] @ unit[b, dst].T
        assert torch.equal(found.into[b], similar.argmax(1))
        assert (similar.amax(1).diff() <= 0).all()
    monkeypatch.setattr("gensparse.processors.agents.SCORE_BYTES", 1)  # one source at a time
    assert all(torch.equal(one, other) for one, other in zip(match(metric, dst), found, strict=True))


def test_every_cell_has_one_drawn_destination_equal_for_equal_numbers_only() -> None:
    draws = [destinations(9, 11, (4, 3), numbers, "cpu") for numbers in ((1, 2, 3), (1, 2, 3), (1, 2, 4), (1, 3, 3))]
    assert torch.equal(draws[0], draws[1])
    assert not any(torch.equal(draws[0], other) for other in draws[2:])
    for dst in draws:
        rows, columns = dst // 11, dst % 11
        assert ((rows // 4) * 3 + columns // 3).tolist() == list(range(6))
        assert (dst.diff() != 0).all()


def test_agents_average_values_and_depend_on_no_order() -> None:
    q, k, v = tensors(2, 20)
    agents = tensors(2, 6, seed=2)[0]

    def attend(v: torch.Tensor, **changes: Any) -> torch.Tensor:
        arguments = {"q": q, "k": k, "agents": agents, "own": v, "sharpness": 0.3, "shortcut": 0.075} | changes
        return agent_attention(v=v, **arguments)

    ones = torch.ones_like(v)
    torch.testing.assert_close(attend(ones), 1.075 * ones)
    torch.testing.assert_close(attend(2 * v + 3 * ones), 2 * attend(v) + 3 * attend(ones))
    torch.testing.assert_close(attend(v, agents=agents.flip(1)), attend(v))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    moved = attend(v[:, order], q=q[:, order], k=k[:, order], own=v[:, order])
    torch.testing.assert_close(moved, attend(v)[:, order])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_beyond_half_precision_stay_finite(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in tensors(1, 16, dim=64))
    q, k = 120 * q, 120 * k
    assert (q.float() @ k.float().transpose(-1, -2)).abs().max() > torch.finfo(torch.float16).max
    out = attention(q, k, v, None)
    assert out.dtype is dtype
    torch.testing.assert_close(out.float(), attention(q.float(), k.float(), v.float(), None), atol=0.02, rtol=0.02)


def test_merged_queries_get_the_rotation_of_the_place_they_stand_at() -> None:
    own, (q, *_) = merging(), tensors(2, 35)
    angle = torch.randn(35, 4, generator=torch.Generator().manual_seed(7)).repeat_interleave(2, dim=1)
    cos, sin = 1.3 * angle.cos(), 1.3 * angle.sin()  # scaled, as rotary embeddings of long contexts are

    def rotate(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        rows = [apply_rotary_emb(x[b : b + 1], (cos[places[b]], sin[places[b]]), sequence_dim=1) for b in range(len(x))]
        return torch.cat(rows)

    rotated = rotate(q, torch.arange(35).expand(2, -1))
    expected = rotate(own.merge(q), own.places)
    torch.testing.assert_close(merge_rotated(rotated, own, (cos, sin)), expected)
    torch.testing.assert_close(merge_rotated(q, own, None), own.merge(q))


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("rotated", [True, False])
def test_with_text_in_the_sequence_only_picture_queries_are_merged(early: bool, rotated: bool) -> None:
    layout = Layout.image(6, 7, text=5)
    q, k, v = tensors(2, 47)
    hidden = torch.randn(2, 42, 6, generator=torch.Generator().manual_seed(3))
    angle = torch.randn(47, 4, generator=torch.Generator().manual_seed(7)).repeat_interleave(2, dim=1)
    rotary = (angle.cos(), angle.sin()) if rotated else None
    notes = SiteNotes()
    notes.block(nn.Identity(), (hidden,), {})
    notes.attention(nn.Identity(), (), {"image_rotary_emb": rotary})
    bias = torch.zeros(2, 1, 47).masked_fill(torch.arange(47) % 11 == 3, -torch.inf)
    call = OperatorCall(layout, None, 0.4, bias, 2, 3, lambda: q, notes)
    own = operator(AgentSD(cell=2, late_cell=2), layout, 0 if early else 40)
    out = own.attend(q, k, v, call)

    def softmax(a: torch.Tensor, b: torch.Tensor, scale: float, extra: torch.Tensor | None = None) -> torch.Tensor:
        logits = torch.einsum("bqhd,bkhd->bhqk", a, b) * scale
        return (logits if extra is None else logits + extra[:, :, None]).softmax(-1)

    def read(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bhqk,bkhd->bqhd", weights, values)

    dense = read(softmax(q, k, 0.4, bias), v)
    torch.testing.assert_close(out[:, :5], dense[:, :5])
    found = match(hidden, own.destinations(call, "cpu"))
    merged, agents = own.counts(42, len(found.dst))
    picture = None if rotary is None else (rotary[0][5:], rotary[1][5:])
    queries = merge_rotated(q[:, 5:], found.merging(merged), picture)
    if early:
        assert agents is not None
        between = merge_rotated(q[:, 5:], found.merging(agents), picture)
        values = read(softmax(between, k, 0.4, bias), v)
        expected = read(softmax(queries, between, 0.4**0.3), values) + 0.075 * found.merging(merged).merge(v[:, 5:])
    else:
        assert agents is None
        expected = read(softmax(queries, k, 0.4, bias), v)
    torch.testing.assert_close(out[:, 5:], found.merging(merged).unmerge(expected))
    assert notes.take() == Seen()


# ------------------------------------------------------------------------------------------------------- on models
@pytest.mark.parametrize(("name", "grid"), MODELS)
@pytest.mark.parametrize("metric", ["hidden", "normed"])
def test_without_merging_and_agents_a_model_is_dense(name: str, grid: tuple[int, int, int], metric: str) -> None:
    model, inputs = tiny_denoiser(name), tiny_inputs(name, grid)
    dense = output(model, inputs)
    method = AgentSD(ratio=0, agent_ratio=0, metric=metric, max_downsample=4)
    handle = gensparse.apply(model, method, strict=True)
    torch.testing.assert_close(output(model, inputs), dense, atol=1e-5, rtol=0)
    assert handle.report()["dense"] == {}


@pytest.mark.parametrize(("name", "grid"), [*MODELS, ("sd15", (1, 1, 11)), ("sd15", (1, 13, 3)), ("flux", (1, 1, 1))])
def test_models_run_at_awkward_sizes_and_are_restored(name: str, grid: tuple[int, int, int]) -> None:
    model, inputs = tiny_denoiser(name), tiny_inputs(name, grid)
    dense = output(model, inputs)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    attributes = {key: set(module.__dict__) for key, module in model.named_modules()}
    handle = gensparse.apply(model, SMALL, strict=True)
    out = output(model, inputs)
    assert out.isfinite().all()
    assert grid == (1, 1, 1) or (out - dense).abs().max() > 1e-3
    assert handle.report()["dense"] == {}
    handle.remove()
    assert torch.equal(output(model, inputs), dense)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert {key: set(module.__dict__) for key, module in model.named_modules()} == attributes


def test_layers_coarser_than_max_downsample_stay_dense() -> None:
    model, inputs = tiny_denoiser("sd15"), tiny_inputs("sd15", (1, 8, 8))
    counts = []
    for limit in (1, 2, 4):
        handle = gensparse.apply(model, AgentSD(max_downsample=limit), strict=True)
        output(model, inputs)
        report = handle.report()
        counts.append(report["sparse"])
        reason = f"agentsd: the layer is coarser than max_downsample={limit}"
        assert report["dense"] == ({} if limit == 4 else {reason: sum(report["dense"].values())})
    assert 0 < counts[0] < counts[1] < counts[2]


def test_a_model_without_fine_layers_says_what_to_pass_and_the_preset_fits() -> None:
    model, inputs = tiny_denoiser("sdxl"), tiny_inputs("sdxl", (1, 6, 6))
    with pytest.raises(ConfigError, match="2 times coarser"):
        gensparse.apply(model, "agentsd")
    handle = gensparse.apply(model, "agentsd:preset=sdxl", strict=True)
    output(model, inputs)
    assert handle.report()["sparse"] > 0


@pytest.mark.parametrize("metric", ["hidden", "normed"])
@pytest.mark.parametrize(("name", "grid"), MODELS)
def test_both_halves_of_guidance_get_the_same_destinations_in_one_call_or_in_two(
    name: str, grid: tuple[int, int, int], metric: str
) -> None:
    model, inputs = tiny_denoiser(name), tiny_inputs(name, grid, batch=2)
    gensparse.apply(model, AgentSD(cell=2, metric=metric, max_downsample=4), strict=True)
    both = output(model, inputs)
    halves = []
    for half in (slice(0, 1), slice(1, 2)):
        halves.append(output(model, {name: _half(x, half) for name, x in inputs.items()}))
    torch.testing.assert_close(torch.cat(halves), both, atol=1e-5, rtol=0)


def _half(value: Any, half: slice) -> Any:
    if isinstance(value, dict):
        return {name: _half(x, half) for name, x in value.items()}
    return value[half] if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == 2 else value


def test_metric_seed_and_chance_matter_and_the_global_generator_does_not() -> None:
    model, inputs = tiny_denoiser("sd15"), tiny_inputs("sd15", (1, 9, 10))
    outs = []
    for changes in ({}, {}, {"metric": "normed"}, {"random": False}, {"seed": 1}):
        torch.manual_seed(len(outs))
        gensparse.apply(model, replace(SMALL, **changes), strict=True)
        outs.append(output(model, inputs))
    assert torch.equal(outs[0], outs[1])
    assert all((outs[0] - other).abs().max() > 1e-5 for other in outs[2:])


def test_steps_and_layers_draw_their_own_destinations() -> None:
    layout, method = Layout.image(16, 16), AgentSD()

    def drawn(step: int, layer: int, seed: int = 0) -> list[int]:
        call = OperatorCall(layout, None, None, None, layer, step, lambda: torch.empty(0))
        return operator(AgentSD(seed=seed), layout).destinations(call, "cpu").tolist()

    assert drawn(3, 1) == drawn(3, 1)
    assert len({tuple(drawn(*place)) for place in ((0, 0), (1, 0), (0, 1), (0, 0, 1))}) == 4
    assert operator(method, layout, 0) != operator(method, layout, 49)


def test_agents_serve_the_first_two_fifths_of_a_run_as_published() -> None:
    layout = Layout.image(64, 64)
    for steps, first in ((50, 20), (20, 8), (None, 20)):
        at = START._replace(steps=steps)
        early = [
            AgentSD().pattern(layout, at._replace(step=i)) == operator(AgentSD(), layout) for i in range(steps or 50)
        ]
        assert early == [True] * first + [False] * ((steps or 50) - first)
    merged, agents = operator(AgentSD(), layout).counts(4096, 256)
    assert (merged, agents) == (1638, 4096 - 256)
    assert operator(AgentSD(), layout, 20).counts(4096, 1024) == (1638, None)
    assert operator(AgentSD(), layout).density(layout) == pytest.approx(256 * 2 * 2458 / 4096**2)
    assert operator(AgentSD(), layout, 20).density(layout) == pytest.approx(2458**2 / 4096**2)
    joint = Layout.image(64, 64, text=77)
    late = operator(AgentSD(), joint, 20).density(joint)
    assert late == pytest.approx((2458 * 4173 + 77 * 4173) / 4173**2)


def test_early_and_late_steps_of_a_run_differ() -> None:
    model, inputs = tiny_denoiser("sd15"), tiny_inputs("sd15", (1, 8, 8))
    gensparse.apply(model, AgentSD(cell=2, late_cell=2, early_steps=1), strict=True)
    outs = [output(model, {**inputs, "timestep": torch.tensor([t, t])}) for t in (900, 700)]
    gensparse.apply(model, AgentSD(cell=2, late_cell=2, early_steps=0), strict=True)
    late = [output(model, {**inputs, "timestep": torch.tensor([t, t])}) for t in (900, 700)]
    assert (outs[0] - late[0]).abs().max() > 1e-4
    assert torch.equal(outs[1], late[1])


def test_a_flux_call_merges_by_the_block_and_knows_the_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_denoiser("flux"), tiny_inputs("flux", (1, 6, 7), text=5)
    seen = []
    original = AgentAttention._metric

    def spy(self: AgentAttention, call: OperatorCall, found: Any, picture: slice) -> torch.Tensor:
        seen.append((found.hidden.shape, found.rotary[0].shape, picture))
        return original(self, call, found, picture)

    monkeypatch.setattr(AgentAttention, "_metric", spy)
    gensparse.apply(model, AgentSD(cell=2), strict=True)
    output(model, inputs)
    assert [tuple(entry[1]) for entry in seen] == [(47, 16)] * 2
    assert [entry[0][1] for entry in seen] == [42, 42]
    assert all(entry[2] == slice(5, 47) for entry in seen)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_note_their_own_inputs(duplicate: Any) -> None:
    model, inputs = tiny_denoiser("sd15"), tiny_inputs("sd15", (1, 8, 6))
    dense = output(model, inputs)
    gensparse.apply(model, SMALL, strict=True)
    expected = output(model, inputs)
    twin = duplicate(model)
    gensparse.remove(model)
    assert torch.equal(output(model, inputs), dense)
    assert torch.equal(output(twin, inputs), expected)
    gensparse.remove(twin)
    assert torch.equal(output(twin, inputs), dense)
    assert not any(module._forward_pre_hooks for module in twin.modules())


def test_two_threads_do_not_mix_what_they_noted() -> None:
    model = tiny_denoiser("sd15")
    gensparse.apply(model, SMALL, strict=True)
    calls = [tiny_inputs("sd15", (1, 6, 8), seed=1), tiny_inputs("sd15", (1, 8, 6), seed=2)]
    expected = [output(model, call) for call in calls]
    wrong: list[int] = []

    def work(index: int) -> None:
        wrong.extend(index for _ in range(2) if not torch.equal(output(model, calls[index]), expected[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_attention_outside_its_block_is_refused_under_the_hidden_metric() -> None:
    model, inputs = tiny_denoiser("sd15"), tiny_inputs("sd15", (1, 4, 6))
    attn = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    x = torch.randn(2, 24, 16)
    gensparse.apply(model, AgentSD(cell=2))
    output(model, inputs)
    with torch.no_grad(), pytest.raises(LayoutMismatchError, match="metric='normed'"):
        attn(x)
    gensparse.apply(model, AgentSD(cell=2, metric="normed"))
    output(model, inputs)
    with torch.no_grad():
        assert attn(x).isfinite().all()


# --------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "lumina2"])
def test_other_families_are_refused_and_left_alone(name: str) -> None:
    model = tiny_denoiser(name)
    with pytest.raises(ConfigError, match="take another method"):
        gensparse.apply(model, AgentSD())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_layouts_without_a_rule_are_a_reason_to_stay_dense() -> None:
    pad = Layout((Segment("target", 12, (1, 3, 4)), Segment("pad", 4)))
    method = AgentSD()
    assert method.why_not(Layout.image(4, 4, text=2)) is None
    assert "5 frames" in (method.why_not(Layout.video(5, 4, 4)) or "")
    assert "padding" in (method.why_not(pad) or "")
    assert "devices" in (method.why_not(Layout.ulysses(Layout.image(4, 4), 2)) or "")
    assert "reference" in (method.why_not(Layout.joint((1, 4, 4), references=[(1, 2, 2)])) or "")
    assert isinstance(method.pattern(Layout.image(4, 4), START._replace(coarseness=2)), Dense)
    assert method.resolved(Subject("UNet", nn.Linear(1, 1))) is method


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("ratio", [-0.1, 1.1, True, "0.5", float("nan")]),
        ("agent_ratio", [2, None]),
        ("late_ratio", [-1]),
        ("late_agent_ratio", ["a"]),
        ("cell", [0, (2, 0), (1, 2, 3), 1.5, True, None]),
        ("late_cell", [-2, "2"]),
        ("early_steps", [-1, 1.0, True]),
        ("k_scale2", [-0.1, float("inf"), True]),
        ("k_shortcut", [-0.1, float("nan")]),
        ("max_downsample", [0, 1.5, True]),
        ("metric", ["raw", None]),
        ("random", [1, "true"]),
        ("seed", [-1, 0.5]),
    ],
)
def test_bad_settings_are_refused_with_name_and_value(setting: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=setting):
            AgentSD(**{setting: value})
