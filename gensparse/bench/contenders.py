"""What is timed: our backends and their rivals, each prepared for one case and checked before it is measured."""

import time
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gensparse.attention import explain, sparse_attention
from gensparse.bench import flex
from gensparse.bench.cases import BenchCase
from gensparse.bench.measure import poisoned_memory
from gensparse.errors import BackendError, NumericsError
from gensparse.kernels import reference
from gensparse.layout import Layout
from gensparse.patterns import Neighborhood, Pattern
from gensparse.plan import Plan, build_plan

Tensors = tuple[Tensor, Tensor, Tensor]
# relative RMS error against fp64 dense attention of the same rounded inputs
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CROSS = 2.0  # times the limit, between two contenders


class Prepared(NamedTuple):
    """One contender made ready for one case.

    Args:
        run: q, k, v [B, S, H, D] -> out.
        visited: token pairs computed per head, None where nothing tells.
        order: int64 token of every place of a permuted sequence (-1 for none), None for the tokens' own order.
        seconds: preparation: plans, block lists; kernels compile on the first call.
    """

    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    visited: int | None
    order: Tensor | None = None
    seconds: float = 0.0

    def permuted(self, tensors: Tensors) -> Tensors:
        """Inputs in the order of the contender."""
        if self.order is None:
            return tensors
        index = self.order.clamp_min(0)
        return tuple(x[:, index] for x in tensors)

    def restored(self, out: Tensor, tokens: int) -> Tensor:
        """The output in the tokens' own order."""
        if self.order is None:
            return out
        places = torch.nonzero(self.order >= 0).reshape(-1)
        result = out.new_full((out.shape[0], tokens, *out.shape[2:]), float("nan"))
        return result.index_copy(1, self.order[places], out[:, places])


class Contender(NamedTuple):
    """A way to compute a case.

    Args:
        make: pattern, layout, example q -> Prepared; raises BackendError with the reason where it cannot.
        on_small: whether the correctness stage runs it on the small layout; compiled rivals are compared with a checked
            contender at full size instead.
    """

    name: str
    make: Callable[[Pattern, Layout, Tensor], Prepared]
    on_small: bool = True


def inputs(layout: Layout, heads: int, dim: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensors:
    """Random q, k, v [1, S, H, D]; zeros would run faster than real data."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (1, layout.tokens, heads, dim)
    return tuple(torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3))


# ----------------------------------------------------------------------------------------------------------- contenders
def ours(backend: str) -> Contender:
    """One of our backends, on the default plan."""

    def make(pattern: Pattern, layout: Layout, q: Tensor) -> Prepared:
        start = time.perf_counter()
        plan = build_plan(pattern, layout).to(q.device)
        reason = explain(plan, q)[backend]
        if reason is not None:
            raise BackendError(reason)
        seconds = time.perf_counter() - start

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return sparse_attention(q, k, v, plan, backend=backend)

        return Prepared(run, _visited(plan, backend), None, seconds)

    return Contender(backend, make)


def _visited(plan: Plan, backend: str) -> int | None:
    """Pairs a backend computes: whole tiles of the lists, or whole key boxes of the halo form."""
    if backend in ("triton", "plan_loop"):
        return int(plan.stats()["visited_pairs"])
    works = plan.halo() if backend == "halo" else plan.partition()
    if works is None or len(works) > 1:
        return None
    pairs = sum(number * queries * keys for number, queries, keys in (tiles.sizes for tiles in works[0].tiles))
    rows = sum((row.queries[1] - row.queries[0]) * sum(b - a for a, b in row.keys) for row in works[0].dense)
    return pairs + rows


def dense(backend: str | None = None) -> Contender:
    """scaled_dot_product_attention over all pairs: another result, the same sizes."""

    def make(pattern: Pattern, layout: Layout, q: Tensor) -> Prepared:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            with _sdpa(backend):
                return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)

        return Prepared(run, layout.tokens**2)

    return Contender("dense" if backend is None else f"dense_{backend}", make, on_small=False)


def _sdpa(backend: str | None):  # a context manager of torch
    from contextlib import nullcontext

    from torch.nn.attention import SDPBackend, sdpa_kernel

    names = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    return nullcontext() if backend is None else sdpa_kernel(names[backend])


def flex_attention(block: int, *, tiles: bool) -> Contender:
    """Compiled FlexAttention in raster or tile order."""

    def make(pattern: Pattern, layout: Layout, q: Tensor) -> Prepared:
        reason = flex.why_not(q.device.type)
        if reason is not None:
            raise BackendError(reason)
        start = time.perf_counter()
        case = flex.flex_case(pattern, layout, block=block, tiles=tiles, device=q.device.type)
        seconds = time.perf_counter() - start
        return Prepared(flex.attend(case, _compiled_flex()), case.visited, case.order, seconds)

    return Contender(f"flex_{'tiles' if tiles else 'raster'}{block}", make, on_small=False)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention as function

    # beyond torch's limit of compiled variants a plain call falls back to computing all pairs; a full graph fails
    return torch.compile(function, dynamic=False, fullgraph=True)


def forget_compiled() -> None:
    """Drop compiled variants before the next case, so that the limit on them is never met."""
    torch._dynamo.reset()


def natten() -> Contender:
    """NATTEN's neighborhood attention, where it is installed."""

    def make(pattern: Pattern, layout: Layout, q: Tensor) -> Prepared:
        if find_spec("natten") is None:
            raise BackendError("natten is not installed")
        if not isinstance(pattern, Neighborhood) or len(layout.segments) > 1:
            raise BackendError("natten has neighborhoods on a grid without text only")
        import natten

        grid = [length for length in layout.grid if length > 1]
        window = pattern.window if isinstance(pattern.window, int) else pattern.window[-len(grid) :]
        sizes = (window,) * len(grid) if isinstance(window, int) else tuple(window)
        function = getattr(natten, f"na{len(grid)}d")

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return function(*(x.unflatten(1, grid) for x in (q, k, v)), kernel_size=sizes).flatten(1, len(grid))

        return Prepared(run, None)

    return Contender("natten", make)


# ---------------------------------------------------------------------------------------------------------- correctness
def check_small(contender: Contender, case: BenchCase, dtype: torch.dtype, device: str, heads: int = 2) -> float:
    """Relative error on the case's small layout, in memory that held NaN, against dense attention in fp64.

    Raises:
        BackendError: the contender cannot run it.
        NumericsError: the error is above `LIMITS`, or a result is not finite.
    """
    pattern, layout = case.small_pattern, case.small
    tensors = inputs(layout, heads, case.dim, dtype, device)
    prepared = contender.make(pattern, layout, tensors[0])
    with poisoned_memory():
        out = prepared.restored(prepared.run(*prepared.permuted(tensors)), layout.tokens)
    allowed = torch.from_numpy(pattern.dense_mask(layout)).to(device)
    want, _ = reference.attend(*(x.double() for x in tensors), allowed)
    return _verdict(contender.name, case.name, out, want, LIMITS[dtype])


def check_same(name: str, case: BenchCase, out: Tensor, checked: Tensor) -> float:
    """Relative error at full size against a contender that passed. Raises NumericsError when they disagree."""
    return _verdict(name, case.name, out, checked, CROSS * LIMITS[checked.dtype])


def _verdict(name: str, case: str, out: Tensor, want: Tensor, limit: float) -> float:
    if not bool(torch.isfinite(out).all()):
        raise NumericsError(f"{name} is wrong on {case}: the result is not finite; no numbers are taken")
    error = relative_error(out, want)
    if not error <= limit:
        raise NumericsError(f"{name} is wrong on {case}: relative error {error:.2g}, allowed {limit:.2g}; no numbers")
    return error


def relative_error(out: Tensor, want: Tensor) -> float:
    """|out - want| / |want| over all heads, in chunks so that little memory is needed."""
    off, size = 0.0, 0.0
    for head in range(want.shape[2]):
        expected = want[:, :, head].double()
        off += float((out[:, :, head].double() - expected).square().sum())
        size += float(expected.square().sum())
    return (off / max(size, 1e-300)) ** 0.5


def refusal(problem: Exception) -> dict[str, object]:
    """What a row says instead of numbers; `failed` marks wrong results, which end the command with an error."""
    lines = str(problem).strip().splitlines() or [""]
    kind = "" if isinstance(problem, BackendError | NumericsError) else f"{type(problem).__name__}: "
    return {"note": f"{kind}{lines[0][:200]}", "failed": isinstance(problem, NumericsError)}
