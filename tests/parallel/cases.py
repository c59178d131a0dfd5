"""What two processes do together; each returns plain data for the tests to judge. Rank 1 is `cases.py STORE OUT`."""

import copy
import json
import sys
from collections.abc import Callable, Hashable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, TensorParallelConfig
from diffusers.hooks import tensor_parallel as tensor_parallel_hooks

import gensparse
from gensparse.layout import Layout
from gensparse.methods import PSA, START, At, Clear, Method, Place, SlidingWindow
from gensparse.parallel import Team, halo, ulysses
from gensparse.patterns import Box, CrissCross, Disc, Pattern, PerHead, Text
from gensparse.testing.tiny import tiny_denoiser, tiny_inputs

CASES: dict[str, Callable[[int], Any]] = {}


def case(function: Callable[[int], Any]) -> Callable[[int], Any]:
    CASES[function.__name__] = function
    return function


@contextmanager
def joined(rank: int, store: str):
    """This process as one of two."""
    count = torch.accelerator.device_count
    torch.accelerator.device_count = lambda: 2  # diffusers divides by it, and a CPU has none
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=30)
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
        torch.accelerator.device_count = count


def run_all(rank: int, store: str) -> dict[str, Any]:
    with joined(rank, store):
        return {name: outcome(function, rank) for name, function in CASES.items()}


def outcome(function: Callable[[int], Any], rank: int) -> Any:
    try:
        return function(rank)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


@torch.no_grad()
def out(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return model(**inputs, return_dict=False)[0]


def compared(name: str, grid: tuple[int, int, int], method: Any, *, model: Any = None, **more: Any) -> dict[str, Any]:
    """A sparse model of one process and the same one divided in two: the largest difference, what was done, and how
    far it is from dense."""
    options = {key: more.pop(key) for key in ("dense_layers", "compiled") if key in more}
    model, inputs = model or tiny_denoiser(name), {**tiny_inputs(name, grid, text=6), **more}
    dense = out(model, inputs)
    parallel = copy.deepcopy(model)
    settings = {"dense_layers": options.get("dense_layers", ()), "strict": True}
    gensparse.apply(model, method, **settings)
    alone = out(model, inputs)
    handle = gensparse.apply(parallel, method, **settings)
    parallel.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    if options.get("compiled"):
        gensparse.compile_blocks(parallel, fullgraph=True, backend="eager")
    together = out(parallel, inputs)
    return {
        "difference": (together - alone).abs().max().item(),
        "effect": (alone - dense).abs().max().item(),
        "report": handle.report(),
    }


@dataclass(frozen=True)
class Heads(Method):
    """Every head has a window of its own."""

    name: ClassVar[str] = "heads"

    def kind(self, place: Place) -> Hashable:
        return place.layer % 2

    def pattern(self, layout: Layout, at: At = START) -> Pattern:
        return PerHead((Box(1) | Text(), Box(3) | Text())).clamped(layout.grid)

    def heads(self, at: At, heads: int) -> tuple[int, ...]:
        return tuple((head + at.kind) % 2 for head in range(heads))


@case
def wan(rank: int) -> Any:
    return compared("wan", (2, 4, 6), SlidingWindow(radius=1), dense_layers=[1])


@case
def flux(rank: int) -> Any:
    return compared("flux", (1, 8, 6), Clear(radius=2))


@case
def pooled_keys(rank: int) -> Any:
    return compared("flux", (1, 6, 10), Clear(radius=2, down_factor=2), compiled=True)


@case
def heads_of_their_own(rank: int) -> Any:
    return compared("wan", (2, 4, 6), Heads())


@case
def chosen_at_run_time(rank: int) -> Any:
    return compared("wan", (2, 4, 6), PSA(block=8, query_block=8, tile=1))


@case
def tensor_parallel(rank: int) -> Any:
    """The weights are divided; heads keep the windows and the random choices that they have in the whole model."""
    tensor_parallel_hooks._SUPPORTED_TP_DEVICES = (*tensor_parallel_hooks._SUPPORTED_TP_DEVICES, "cpu")
    results = []
    for method in (Heads(), PSA(block=8, query_block=8, tile=1)):
        model, inputs = tiny_denoiser("flux"), tiny_inputs("flux", (1, 8, 6))
        divided = copy.deepcopy(model)
        gensparse.apply(model, method, strict=True)
        handle = gensparse.apply(divided, method, strict=True)
        divided.enable_parallelism(config=TensorParallelConfig(tp_degree=2))
        results.append((out(divided, inputs) - out(model, inputs)).abs().max().item())
        assert handle.report()["sparse"] == 2
    return results


@case
def uneven(rank: int) -> Any:
    """Parts of 2 + 8 and 1 + 7 tokens, 2 and 1 heads; text, then a picture."""
    team, layout = Team.of(dist.group.WORLD, uneven=True), Layout.image(5, 3, text=3)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 18, 3, 8, generator=generator) for _ in range(3))
    pattern, groups = PerHead((Box(1) | Text(), Box(2) | Text())), torch.tensor([[0, 1, 0]])
    alone = gensparse.sparse_attention(q, k, v, gensparse.build_plan(pattern, layout), groups=groups)
    divided = ulysses.divided(layout, 2)
    order, parts = torch.from_numpy(divided.order()), divided.shares()
    own = [ulysses.gather(x[:, order].split(parts, 1)[rank], team, parts) for x in (q, k, v)]
    plan, heads = gensparse.build_plan(pattern, divided), team.share(3)
    out = gensparse.sparse_attention(*own, plan, groups=groups[:, heads])
    back = ulysses.scatter(out, team, parts, 3)
    return (back - alone[:, order].split(parts, 1)[rank]).abs().max().item()


@case
def too_few_heads(rank: int) -> Any:
    return compared("wan", (2, 4, 6), Heads(), model=tiny_denoiser("wan", num_attention_heads=3))


@case
def ring(rank: int) -> Any:
    model, inputs = tiny_denoiser("wan"), tiny_inputs("wan", (2, 4, 6))
    gensparse.apply(model, SlidingWindow(radius=1))
    model.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
    return out(model, inputs).shape


@case
def other_sizes(rank: int) -> Any:
    return compared("wan", ((2, 4, 6), (2, 6, 4))[rank], SlidingWindow(radius=1))


@case
def other_seeds(rank: int) -> Any:
    return compared("wan", (2, 4, 6), SlidingWindow(radius=1), **tiny_inputs("wan", (2, 4, 6), seed=rank))


@case
def a_missing_process(rank: int) -> Any:
    team = Team.of(dist.group.WORLD)
    if rank == 1:
        dist.barrier()
        team.agree("late")
        return "came later"
    try:
        return team.agree("early", timeout=0.2)
    finally:
        dist.barrier()


@case
def strips_of_rows(rank: int) -> Any:
    """Largest difference to one process, for windows that need few rows, many, or all of the other's."""
    team, results = Team.of(dist.group.WORLD), []
    for pattern, layout in (
        (Disc(3) | Text(), Layout.image(11, 6, text=5)),
        (Box((1, 4, 2)) | Text(), Layout.video(3, 5, 7, text=4)),
        (PerHead((CrissCross(), Box(1))) | Text(), Layout.image(7, 8, text=2, text_first=False)),
        (Disc(2), Layout.image(8, 5)),
    ):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, layout.tokens, 2, 8, generator=generator) for _ in range(3))
        bias = torch.randn(2, 1, layout.tokens, generator=generator)
        plan = gensparse.build_plan(pattern, layout)
        options = {"groups": torch.tensor([[0, 1]])} if plan.groups > 1 else {}
        alone = gensparse.sparse_attention(q, k, v, plan, key_bias=bias, **options)
        strips = halo.divide(pattern, layout, team)
        own = (x[:, strips.tokens] for x in (q, k, v))
        out = halo.attend(*own, strips, key_bias=bias[..., strips.tokens], **options)
        results.append((out - alone[:, strips.tokens]).abs().max().item())
    return results


@case
def other_strips(rank: int) -> Any:
    return halo.divide(Disc(2 + rank), Layout.image(8, 8), Team.of(dist.group.WORLD)).fetched


@case
def there_and_back(rank: int) -> Any:
    """Tokens and gradients after both exchanges, for parts of 4 and 3 tokens and 3 heads."""
    team, parts = Team.of(dist.group.WORLD, uneven=True), (4, 3)
    whole = torch.randn(2, 7, 3, 5, generator=torch.Generator().manual_seed(0))
    own = whole.split(parts, 1)[rank].clone().requires_grad_()
    gathered = ulysses.gather(own, team, parts)
    back = ulysses.scatter(gathered * 2, team, parts, 3)
    (grad,) = torch.autograd.grad((back * own.detach()).sum(), own)
    keys = ulysses.gather_keys(whole[:, :, :, 0].transpose(1, 2).split(parts, 2)[rank], team, parts)
    heads = team.share(3)
    return [
        torch.equal(gathered, whole[:, :, heads]),
        torch.equal(back, 2 * own),
        torch.equal(grad, 2 * own),
        torch.equal(keys, whole[:, :, heads, 0].transpose(1, 2)),
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    store, file = (Path(name) for name in sys.argv[1:])
    file.with_suffix(".ready").touch()
    file.write_text(json.dumps(run_all(1, str(store))))
