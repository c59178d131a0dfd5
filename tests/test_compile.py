"""torch.compile: one graph per block and no more compilations than dense; results and counts of eager mode."""

import threading
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch._dynamo.exc import Unsupported

import gensparse
from gensparse.errors import ConfigError
from gensparse.layout import Layout
from gensparse.methods import PSA, START, At, Clear, Loaded, Method, Place, SlidingWindow
from gensparse.patterns import Box, Pattern, PerHead, Pooled, Text
from gensparse.testing.tiny import tiny_denoiser, tiny_inputs

SMALL = SlidingWindow(radius=1)
DEEP = {"num_layers": 12}  # more than the recompilations torch allows


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    yield
    torch.compiler.reset()


class Counter:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0
        self._seen = 0

    def __call__(self, module: torch.fx.GraphModule, _inputs: Any) -> Any:
        self.graphs += 1
        return module.forward

    def new(self) -> int:
        """Graphs since the last time."""
        new, self._seen = self.graphs - self._seen, self.graphs
        return new


@torch.no_grad()
def run(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return model(**inputs, return_dict=False)[0]


def graphs(model: Any, calls: list[dict[str, Any]], **options: Any) -> list[int]:
    """New graphs in each call of a model whose blocks are compiled now."""
    counter, counts = Counter(), []
    gensparse.compile_blocks(model, fullgraph=True, backend=counter, **options)
    for inputs in calls:
        run(model, inputs)
        counts.append(counter.new())
    return counts


@pytest.mark.parametrize(
    ("name", "settings", "grids", "counts"),
    [
        # as the dense model: FLUX has two classes of blocks, and the first single block gets tokens of other strides
        ("flux", {"double_blocks": 1, "single_blocks": 12}, [(1, 8, 6), (1, 8, 6)], [3, 0]),
        ("wan", DEEP, [(3, 4, 6), (2, 5, 3), (3, 4, 6), (2, 5, 3)], [1, 1, 0, 0]),
        # both levels with attention have 12 blocks
        ("sdxl", {}, [(1, 8, 6), (1, 8, 6)], [2, 0]),
    ],
    ids=["flux", "wan", "sdxl"],
)
def test_whole_blocks_compile_once_per_class_and_grid_and_never_per_layer(
    name: str, settings: dict[str, Any], grids: list[tuple[int, int, int]], counts: list[int]
) -> None:
    model, calls = tiny_denoiser(name, **settings), [tiny_inputs(name, grid) for grid in grids]
    handle, counter = gensparse.apply(model, SMALL, strict=True), Counter()
    expected = [run(model, inputs) for inputs in calls]
    eager = handle.report()["calls"]["sparse"]
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    for inputs, want, most in zip(calls, expected, counts, strict=True):
        torch.testing.assert_close(run(model, inputs), want, atol=1e-5, rtol=0)
        assert counter.new() == most
    assert handle.report()["calls"] == {"sparse": 2 * eager, "dense": {}}
    assert handle.report()["backend"] == "plan_loop"


@dataclass(frozen=True)
class Heads(Method):
    """A menu of two windows; even layers have others for their heads than odd ones."""

    name: ClassVar[str] = "heads"

    def kind(self, place: Place) -> Hashable:
        return place.layer % 2

    def pattern(self, layout: Layout, at: At = START) -> Pattern:
        return PerHead((Box(1) | Text(), Box(2) | Text())).clamped(layout.grid)

    def heads(self, at: At, heads: int) -> tuple[int, ...]:
        return tuple((head + at.kind) % 2 for head in range(heads))


class Weights(Loaded):
    """Pooling weights of every site."""

    def sources(self, place: Place) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(place.layer)
        return {"own": torch.rand(2, 2, generator=generator)}

    def undo(self) -> None:
        pass


@dataclass(frozen=True)
class Learned(Method):
    """A window and the picture pooled by weights that every layer has of its own."""

    name: ClassVar[str] = "learned"

    def pattern(self, layout: Layout, at: At = START) -> Pattern:
        return (Box(1) | Text() | Pooled(cells=2, name="own")).clamped(layout.grid)

    def load(self, subject: Any, places: Any) -> Loaded:
        return Weights()


@pytest.mark.parametrize(
    ("name", "settings", "grid", "method", "classes"),
    [
        ("wan", DEEP, (3, 4, 6), Heads(), 1),
        ("flux", {"double_blocks": 10, "single_blocks": 0}, (1, 8, 6), Learned(), 1),
        ("flux", {"double_blocks": 10, "single_blocks": 0}, (1, 7, 5), SMALL, 1),
    ],
)
def test_menus_of_heads_weights_of_layers_and_key_masks_need_no_further_graph(
    name: str, settings: dict[str, Any], grid: tuple[int, int, int], method: Method, classes: int
) -> None:
    model, inputs = tiny_denoiser(name, **settings), tiny_inputs(name, grid)
    if method is SMALL:
        mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) > 0.2
        inputs["joint_attention_kwargs"] = {"attention_mask": mask}
    handle = gensparse.apply(model, method, strict=True)
    expected = run(model, inputs)
    assert graphs(model, [inputs, inputs]) == [classes, 0]
    torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=0)
    assert handle.report()["dense"] == {}


def test_dense_steps_cost_one_more_graph_per_class_once() -> None:
    model, inputs = tiny_denoiser("wan", num_layers=1), tiny_inputs("wan", (3, 4, 6))
    handle = gensparse.apply(model, SMALL, strict=True, dense_steps=1)
    times = [{**inputs, "timestep": torch.full((2,), time)} for time in (900.0, 500.0, 900.0, 500.0)]
    assert graphs(model, times) == [1, 1, 0, 0]
    assert handle.report()["calls"] == {"sparse": 2, "dense": {"dense step": 2}}


def test_dense_layers_cost_one_more_graph_per_class() -> None:
    model, inputs = tiny_denoiser("wan", **DEEP), tiny_inputs("wan", (3, 4, 6))
    handle = gensparse.apply(model, SMALL, strict=True, dense_layers=[0, 5, -1])
    expected = run(model, inputs)
    assert graphs(model, [inputs, inputs]) == [2, 0]
    torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=0)
    assert handle.report()["dense"] == {"dense layer": 3}


def test_apply_and_remove_after_compiling_cost_a_graph_and_nothing_else() -> None:
    model, inputs, counter = tiny_denoiser("wan"), tiny_inputs("wan", (3, 4, 6)), Counter()
    gensparse.apply(model, SMALL)
    expected = run(model, inputs)
    gensparse.remove(model)
    gensparse.compile_blocks(model, fullgraph=True, backend=counter)
    dense = run(model, inputs)
    counts = [counter.new()]
    for _ in range(2):
        handle = gensparse.apply(model, SMALL, strict=True)
        torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=0)
        counts.append(counter.new())
        assert handle.report()["calls"] == {"sparse": 2, "dense": {}}
        handle.remove()
        assert torch.equal(run(model, inputs), dense)
        counts.append(counter.new())
    assert counts == [1, 1, 0, 0, 0]


def test_a_strict_mismatch_under_one_graph_is_an_error_that_says_why() -> None:
    model, inputs = tiny_denoiser("wan"), tiny_inputs("wan", (3, 4, 6))
    gensparse.apply(model, SMALL, strict=True)
    gensparse.compile_blocks(model, fullgraph=True, backend="eager")
    run(model, inputs)
    block = model.blocks[0]
    hidden, time = torch.randn(1, 40, 24), torch.randn(1, 6, 24)
    with pytest.raises(Exception, match="40 tokens"):
        block(hidden, torch.randn(1, 5, 24), time, None)


def test_keys_chosen_at_run_time_break_the_graph_and_are_counted() -> None:
    model, inputs = tiny_denoiser("wan", num_layers=3), tiny_inputs("wan", (2, 5, 7))
    handle = gensparse.apply(model, PSA(block=8, query_block=8, tile=1), strict=True)
    expected, counter = run(model, inputs), Counter()
    gensparse.compile_blocks(model, backend=counter)
    for _ in range(2):
        torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=0)
    assert handle.report()["calls"] == {"sparse": 9, "dense": {}}
    assert counter.graphs < 6  # a few parts of a block, once
    gensparse.compile_blocks(model, fullgraph=True, backend="eager")
    with pytest.raises(Unsupported, match="disable"):
        run(model, inputs)


def test_samples_of_different_lengths_break_the_graph_and_are_counted() -> None:
    """Mochi attends sample by sample, with as much text as each has."""
    model, inputs = tiny_denoiser("mochi", num_layers=1), tiny_inputs("mochi", (2, 5, 4))
    handle = gensparse.apply(model, SMALL, strict=True)
    expected = run(model, inputs)
    gensparse.compile_blocks(model, backend="eager")
    torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=0)
    assert handle.report()["dense"] == {}


def test_gradients_of_compiled_blocks_are_those_of_eager_ones() -> None:
    model, inputs = tiny_denoiser("wan", num_layers=1), tiny_inputs("wan", (2, 5, 3))
    gensparse.apply(model, SMALL, strict=True)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(**inputs, return_dict=False)[0].square().mean().backward()
        return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]

    expected = gradients()
    gensparse.compile_blocks(model, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_compiled_kernels_give_the_eager_picture() -> None:
    model, inputs = tiny_denoiser("flux", double_blocks=1, single_blocks=0), tiny_inputs("flux", (1, 8, 6))
    gensparse.apply(model, SMALL, strict=True)
    expected = run(model, inputs)
    gensparse.compile_blocks(model, fullgraph=True)
    torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=0)


def test_threads_on_compiled_blocks_do_not_mix_their_layouts() -> None:
    model, differing = tiny_denoiser("wan"), []
    calls = [tiny_inputs("wan", grid) for grid in ((2, 4, 6), (2, 6, 4))]
    gensparse.apply(model, SMALL, strict=True)
    expected = [run(model, inputs) for inputs in calls]
    gensparse.compile_blocks(model, fullgraph=True, backend="eager")
    for inputs in calls:
        run(model, inputs)

    def work(index: int) -> None:
        for _ in range(5):
            if not torch.allclose(run(model, calls[index]), expected[index], atol=1e-5, rtol=0):
                differing.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not differing


def test_blocks_that_diffusers_names_none_of_are_compiled_too() -> None:
    model, inputs = tiny_denoiser("sd3"), tiny_inputs("sd3", (1, 8, 6))
    gensparse.apply(model, Clear(radius=2), strict=True)
    expected, counter = run(model, inputs), Counter()
    assert gensparse.compile_blocks(model, fullgraph=True, backend=counter) == len(model.transformer_blocks)
    torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=0)
    assert counter.graphs >= 1


def test_a_model_of_no_family_or_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="no supported family"):
        gensparse.compile_blocks(torch.nn.Linear(1, 1))
    model = tiny_denoiser("sd3")
    model.transformer_blocks = torch.nn.ModuleList()
    with pytest.raises(ConfigError, match="no repeated blocks"):
        gensparse.compile_blocks(model)
