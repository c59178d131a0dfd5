"""Methods with averaged keys, proxy and hilo, and biformer's regions: limits, definitions, refusals."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from families.family_checks import check_small_window_equals_masked_dense, output
from one_layer import attend

import gensparse
from gensparse.errors import ConfigError, LayoutMismatchError
from gensparse.kernels import reference
from gensparse.layout import Layout
from gensparse.methods import START, At, BiFormer, HiLo, Method, Place, Proxy
from gensparse.patterns import Pattern, Text
from gensparse.patterns import Proxy as ProxyPattern
from gensparse.plan import RouteContext, RoutedPlan, build_plan
from gensparse.testing.tiny import tiny_denoiser, tiny_inputs

MODELS = [("flux", (1, 7, 5)), ("sd15", (1, 9, 6)), ("wan", (3, 4, 5)), ("hunyuan_video", (2, 3, 5))]
DENSE = [Proxy(window=1), Proxy(window=100), Proxy(window=None), HiLo(window=1), BiFormer(regions=3, top=1000)]


def tensors(tokens: int, heads: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(2, tokens, heads, 8, generator=generator, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("method", DENSE, ids=repr)
@pytest.mark.parametrize(("name", "grid"), MODELS)
def test_settings_that_leave_nothing_out_are_dense(name: str, grid: tuple[int, int, int], method: Method) -> None:
    model, inputs = tiny_denoiser(name), tiny_inputs(name, grid)
    dense = output(model, inputs)
    handle = gensparse.apply(model, method, strict=True)
    torch.testing.assert_close(output(model, inputs), dense, atol=1e-5, rtol=0)
    assert handle.report()["dense"] == {}


@pytest.mark.parametrize("method", [Proxy(2), HiLo(2), BiFormer(2, 1)], ids=repr)
@pytest.mark.parametrize(("name", "grid"), MODELS)
def test_small_settings_change_the_model_and_remove_restores_bits(
    name: str, grid: tuple[int, int, int], method: Method
) -> None:
    model, inputs = tiny_denoiser(name), tiny_inputs(name, grid)
    dense = output(model, inputs)
    with gensparse.applied(model, method, strict=True):
        assert (output(model, inputs) - dense).abs().max() > 1e-3
    assert torch.equal(output(model, inputs), dense)


def test_averages_under_a_mask_compile_in_one_graph() -> None:
    model, inputs = tiny_denoiser("hunyuan_video"), tiny_inputs("hunyuan_video", (2, 3, 5))
    gensparse.apply(model, Proxy(2), strict=True)
    eager = output(model, inputs)
    torch.compiler.reset()
    try:
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            block.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(output(model, inputs), eager, atol=1e-5, rtol=0)
    finally:
        torch.compiler.reset()


Cell = Callable[[tuple[int, ...]], tuple[int, ...]]


def cells_loop(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, cell: Cell, head: str, whole: int = 1
) -> torch.Tensor:
    """Attention by its definition, query by query: text exactly; of the picture the own cell (head "near"), the
    averages of all cells ("far"), or the own cell and the averages of the others ("both")."""
    start = layout.starts[layout.target]
    places = {t: start + n for n, t in enumerate(itertools.product(*(range(n) for n in layout.grid)))}
    cells: dict[tuple[int, ...], list[int]] = {}
    for token, place in places.items():
        cells.setdefault(cell(token), []).append(place)
    words = sorted(set(range(layout.tokens)) - set(places.values()))
    own_cell = {place: members for members in cells.values() for place in members}
    out = torch.zeros_like(q)
    for b, h, i in np.ndindex(q.shape[0], q.shape[2], layout.tokens):
        exact, means = words, list(cells.values())
        if i not in own_cell:
            exact, means = list(range(layout.tokens)), []
        elif head != "far":
            exact = words + own_cell[i]
            means = [m for m in means if m is not own_cell[i]] if head == "both" else []
        keys, values = [k[b, exact, h]], [v[b, exact, h]]
        logs = [torch.zeros(len(exact), dtype=q.dtype)]
        for members in means:
            keys.append(k[b, members, h].mean(0, keepdim=True))
            values.append(v[b, members, h].mean(0, keepdim=True))
            logs.append(torch.tensor([len(members) / whole], dtype=q.dtype).log())
        logits = torch.cat(keys) @ q[b, i, h] / q.shape[-1] ** 0.5 + torch.cat(logs)
        out[b, i, h] = logits.softmax(0) @ torch.cat(values)
    return out


LAYOUTS = [Layout.image(5, 4, text=3), Layout.video(3, 4, 2, text=2), Layout.image(1, 7)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_proxy_is_the_own_window_and_one_average_of_every_other(layout: Layout) -> None:
    window = tuple(min(3, n) for n in layout.grid)
    q, k, v = tensors(layout.tokens, 1)
    expected = cells_loop(q, k, v, layout, lambda t: tuple(x // w for x, w in zip(t, window, strict=True)), "both")
    torch.testing.assert_close(attend_double(Proxy(3), layout, q, k, v), expected)


def attend_double(method: Method, layout: Layout, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    torch.set_default_dtype(torch.float64)
    try:
        return attend(method, layout, q, k, v)
    finally:
        torch.set_default_dtype(torch.float32)


def test_every_other_layer_has_shifted_windows() -> None:
    method, layout = Proxy(window=(4, 3)), Layout.image(9, 8, text=2)
    kinds = [method.kind(Place("joint", layer, 4, 2)) for layer in range(4)]
    assert kinds[0] == kinds[2] != kinds[1] == kinds[3]
    assert {Proxy(alternate=False).kind(Place("joint", layer, 4, 2)) for layer in range(4)} == {kinds[0]}
    masks = [method.pattern(layout, START._replace(kind=kind)).dense_mask(layout)[0] for kind in kinds[:2]]
    own = np.arange(2, 74)
    for mask, shift in zip(masks, ((0, 0), (2, 1)), strict=True):
        rows, columns = np.divmod(own - 2, 8)
        number = (rows + 4 - shift[0]) // 4 * 100 + (columns + 3 - shift[1]) // 3
        assert (mask[2:, 2:74] == (number[:, None] == number)).all()


def test_a_model_alternates_and_an_axis_of_one_window_is_not_shifted() -> None:
    model, inputs = tiny_denoiser("wan"), tiny_inputs("wan", (3, 4, 5))
    outs = []
    for alternate in (True, False):
        gensparse.apply(model, Proxy(2, alternate), strict=True)
        outs.append(output(model, inputs))
    assert (outs[0] - outs[1]).abs().max() > 1e-4
    layout = Layout.video(3, 4, 5)
    shifted = Proxy((None, 4, 2)).pattern(layout, START._replace(kind=Proxy().kind(Place("self", 1, 2, 2))))
    assert shifted == ProxyPattern((3, 4, 2), (0, 0, 1)) | Text()


def test_equal_tokens_inside_windows_make_proxy_dense_and_a_constant_value_passes_through() -> None:
    layout = Layout.image(6, 9, text=2)
    q, k, v = tensors(layout.tokens, 1)
    cell = torch.arange(54).view(6, 9) // 27 * 3 + torch.arange(9) // 3  # 3 x 3 windows
    first = [int((cell.flatten() == c).nonzero()[0]) for c in range(6)]
    for x in (k, v):
        x[:, 2:] = x[:, 2:][:, torch.tensor(first)[cell.flatten()]]
    everything = torch.ones(1, 56, 56, dtype=torch.bool)
    expected = reference.attend(q, k, v, everything)[0]
    torch.testing.assert_close(attend_double(Proxy(3), layout, q, k, v), expected)
    torch.testing.assert_close(attend_double(Proxy(3), layout, q, k, v + 7.5), expected + 7.5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
@pytest.mark.parametrize(
    ("method", "low"),
    [(HiLo(2), {2, 3}), (HiLo(2, 0.3), {3}), (HiLo(2, low_heads=(0, 2)), {0, 2}), (HiLo(2, 0), set())],
)
def test_hilo_heads_see_their_window_or_all_averages(layout: Layout, method: HiLo, low: set[int]) -> None:
    window = tuple(min(2, n) for n in layout.grid)
    q, k, v = tensors(layout.tokens)
    words = len(layout.segments) > 1

    def cell(token: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(x // w for x, w in zip(token, window, strict=True))

    out = attend_double(method, layout, q, k, v)
    for head in range(4):
        one = slice(head, head + 1)
        kind, whole = ("far", 1 if words else int(np.prod(window))) if head in low else ("near", 1)
        expected = cells_loop(q[:, :, one], k[:, :, one], v[:, :, one], layout, cell, kind, whole)
        torch.testing.assert_close(out[:, :, one], expected)


def test_hilo_refuses_heads_that_the_model_does_not_have_and_leaves_it_alone() -> None:
    model, inputs = tiny_denoiser("flux"), tiny_inputs("flux", (1, 6, 7))
    gensparse.apply(model, HiLo(2))
    before = output(model, inputs)
    with pytest.raises(ConfigError, match="names head 2, but FluxTransformer2DModel has layers of 2 heads"):
        gensparse.apply(model, HiLo(low_heads=(0, 2)))
    assert torch.equal(output(model, inputs), before)


@pytest.mark.parametrize("layout", [Layout.image(7, 11, text=5), Layout.video(3, 6, 5, text=4)], ids=repr)
@pytest.mark.parametrize("method", [BiFormer(3, 2), BiFormer(3, 2, per_head=True), BiFormer((2, 3, 2), 4)], ids=repr)
def test_biformer_is_attention_under_its_choice_with_own_region_and_text(layout: Layout, method: BiFormer) -> None:
    if method.regions == (2, 3, 2) and layout.grid[0] == 1:
        layout = Layout.video(2, 7, 5, text=5)
    q, k, v = tensors(layout.tokens)
    plan = build_plan(method.pattern(layout), layout)
    assert isinstance(plan, RoutedPlan)
    mask = torch.from_numpy(method.pattern(layout).dense_mask(layout, plan.select(q, k, RouteContext())))
    assert mask.shape[1] == (4 if method.per_head else 1)
    start, picture = layout.starts[layout.target], int(np.prod(layout.grid))
    words = torch.tensor([i for i in range(layout.tokens) if not start <= i < start + picture])
    assert mask[..., words].all()
    assert mask[..., words, :].all()
    assert mask.diagonal(dim1=2, dim2=3).all()
    assert not mask.all()
    expected = reference.attend(q, k, v, mask)[0]
    torch.testing.assert_close(attend_double(method, layout, q, k, v), expected)


def test_biformer_on_a_model_follows_its_tokens_not_their_order() -> None:
    """Regions hold the same tokens whatever the batch, so samples do not influence each other."""
    model, inputs = tiny_denoiser("pixart"), tiny_inputs("pixart", (1, 7, 8))
    gensparse.apply(model, BiFormer(3, 2), strict=True)
    both = output(model, inputs)
    alone = output(model, {name: x[1:] if isinstance(x, torch.Tensor) else x for name, x in inputs.items()})
    torch.testing.assert_close(alone, both[1:], atol=1e-5, rtol=0)


def test_hilo_without_low_heads_equals_a_dense_masked_model() -> None:
    """Plain windows, also at the two attention layers of a block that share a processor."""
    model, inputs = tiny_denoiser("sd35"), tiny_inputs("sd35", (1, 7, 5))
    layouts = {"joint": Layout.image(7, 5, text=5, text_first=False), "image": Layout.image(7, 5)}

    class Windows(HiLo):
        """The same as one pattern, whose mask has no averages."""

        def pattern(self, layout: Layout, at: At = START) -> Pattern:
            menu, text = super().pattern(layout, at).parts
            return menu.parts[0] | text

        def heads(self, at: At, heads: int) -> None:
            return None

    check_small_window_equals_masked_dense(model, inputs, layouts, Windows(3, 0))
    outs = []
    for method in (HiLo(3, 0), Windows(3, 0)):
        with gensparse.applied(model, method, strict=True):
            outs.append(output(model, inputs))
    torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", [Proxy(), HiLo(), BiFormer()], ids=repr)
def test_reference_pictures_are_a_reason_to_stay_dense(method: Method) -> None:
    model, inputs = tiny_denoiser("flux_kontext"), tiny_inputs("flux_kontext", (1, 6, 7))
    dense = output(model, inputs)
    handle = gensparse.apply(model, method)
    assert torch.equal(output(model, inputs), dense)
    assert handle.report()["dense"] == {f"{method.name} has no rule for reference pictures": 2}
    gensparse.apply(model, method, strict=True)
    with pytest.raises(LayoutMismatchError, match="reference pictures"):
        output(model, inputs)


@pytest.mark.parametrize(
    ("cls", "setting", "values"),
    [
        (Proxy, "window", [0, 1.5, True, (3, 0), (1, 2, 3, 4), "4"]),
        (Proxy, "alternate", [1, "true", None]),
        (HiLo, "window", [0, None, (2, True)]),
        (HiLo, "alpha", [-0.1, 1.5, True, "0.5", float("nan")]),
        (HiLo, "low_heads", [-1, (0, -2), (0.5,), True]),
        (BiFormer, "regions", [0, (2, 0), None]),
        (BiFormer, "top", [0, 1.5, True]),
        (BiFormer, "own", [1, None]),
        (BiFormer, "per_head", [1, None]),
    ],
)
def test_bad_settings_are_refused_with_name_and_value(cls: type[Method], setting: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=setting):
            cls(**{setting: value})
