"""Kernel configs timed on the GPU at hand, for the user's table."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gensparse.bench import record
from gensparse.bench.contenders import LIMITS, inputs, relative_error
from gensparse.bench.measure import gpu_seconds, poisoned_memory
from gensparse.errors import BackendError, ConfigError
from gensparse.kernels import reference
from gensparse.kernels.lists import Schedule
from gensparse.kernels.triton import tune as tables
from gensparse.kernels.triton.tune import KERNELS, Case, Config, arch_of, padded_dim, write_user_table
from gensparse.layout import Layout
from gensparse.patterns import Disc, Text
from gensparse.plan import Plan, build_plan
from gensparse.plan.build import K_TILE

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SMALL, LARGE = Layout.image(27, 21, text=21), Layout.image(128, 128, text=512)
HEADS = {"small": 2, "large": 16}
PATTERN = {"small": Disc(9) | Text(), "large": Disc(16) | Text()}
Row = dict[str, Any]
Say = Callable[[str], None]
BLOCKS = ((128, 64), (128, 32), (64, 64), (64, 32), (32, 64), (32, 32))


@dataclass(frozen=True)
class Tune:
    """What `gensparse tune` tries.

    Args:
        dtypes: "bf16", "fp16", "fp32".
        dims: head dimensions, 1 to 256; each stands for all that are padded to the same size.
        kernels: of "forward", "dq", "dkv".
        seconds: after this long nothing new is started; cells that were finished count.

    Raises:
        ConfigError: a value that is not allowed.
    """

    dtypes: tuple[str, ...] = ("bf16",)
    dims: tuple[int, ...] = (64, 128)
    kernels: tuple[str, ...] = KERNELS
    seconds: float = 540.0

    def __post_init__(self) -> None:
        for name in self.dtypes:
            if name not in DTYPES:
                raise ConfigError(f"--dtype is {name!r}; choose of {', '.join(DTYPES)}")
        for dim in self.dims:
            if not 1 <= dim <= 256:
                raise ConfigError(f"--head-dim is {dim}; give 1 to 256")
        for name in self.kernels:
            if name not in KERNELS:
                raise ConfigError(f"--kernel is {name!r}; choose of {', '.join(KERNELS)}")
        if not self.seconds > 0:
            raise ConfigError(f"--seconds is {self.seconds:g}; give more than 0")

    def cells(self) -> list[tuple[str, str, int]]:
        """(dtype, kernel, padded head dimension), forward kernels first."""
        dims = sorted({padded_dim(dim) for dim in self.dims})
        wanted = [kernel for kernel in KERNELS if kernel in self.kernels]
        return [(dtype, kernel, dim) for kernel in wanted for dtype in self.dtypes for dim in dims]


def candidates(dtype: str, kernel: str, dim: int) -> list[Config]:
    """Configs worth compiling: operands fit 227 KiB of shared memory, no warp has too much or too little to do."""
    size = 4 if dtype == "fp32" else 2
    found = []
    for rows, columns in BLOCKS:
        work = rows * columns * dim
        for warps in (8, 4):
            if not (1 << 16) * warps // 2 <= work <= (1 << 17) * warps and (rows, columns) != BLOCKS[-1]:
                continue
            for stages in (3, 2, 4) if kernel == "forward" else (2, 1):
                held = size * dim * (rows + 2 * columns * max(1, stages - 1))
                if held <= 227 << 10:
                    found.append(Config(rows, columns, warps, stages))
                    if stages == 3 and _boxes_too(dtype, kernel, dim, columns):
                        found.append(Config(rows, columns, warps, stages, "boxes"))
    return found


def _boxes_too(dtype: str, kernel: str, dim: int, columns: int) -> bool:
    """Whether the kernel may also load whole key tiles by descriptor; the GPU decides the rest."""
    return kernel in tables.LOADERS["boxes"] and dtype != "fp32" and dim in tables.BOX_DIMS and columns == K_TILE


def run_tune(tune: Tune, say: Say = print) -> Iterator[Row]:
    """Rows of all configs tried, as they are ready.

    Raises:
        BackendError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise BackendError("tuning times kernels on a GPU and this machine has none; run it on the machine you use")
    end = time.monotonic() + tune.seconds
    for dtype, kernel, dim in tune.cells():
        if time.monotonic() >= end:
            say(f"{kernel} {dtype} {dim}: not started, the time limit was reached")
            continue
        say(f"{kernel} {dtype} head dimension {dim}")
        yield from tune_cell(dtype, kernel, dim, end, "cuda", _timer)


def _timer(run: Callable[[], Any]) -> float:
    return gpu_seconds(run, [()], rep=60)


def tune_cell(
    dtype: str, kernel: str, dim: int, end: float, device: str, timer: Callable[[Callable[[], Any]], float]
) -> Iterator[Row]:
    """One row per config: seconds, or why there are none. Nothing wrong is timed."""
    small, large = (_Call(name, dtype, kernel, dim, device) for name in ("small", "large"))
    for config in candidates(dtype, kernel, dim):
        if time.monotonic() >= end:
            return
        row = {"kernel": kernel, "dtype": dtype, "dim": dim, **asdict(config)}
        reason = large.why_no_boxes(config) or small.why_no_boxes(config)
        if reason is not None:
            yield row | {"note": reason}
            continue
        try:
            with forced(kernel, config):
                error = small.error()
                if not error <= LIMITS[DTYPES[dtype]] * (1 if kernel == "forward" else 3):
                    yield row | {"note": f"wrong: relative error {error:.2g}"}
                    continue
                yield row | {"error": error, "seconds": timer(large.run)}
        except (BackendError, torch.OutOfMemoryError) as problem:
            yield row | {"note": str(problem).splitlines()[0][:160]}


def best(rows: Sequence[Row]) -> list[Row]:
    """The fastest row of every cell."""
    fastest: dict[tuple, Row] = {}
    for row in rows:
        cell = (row["kernel"], row["dtype"], row["dim"])
        if row.get("seconds") and (cell not in fastest or row["seconds"] < fastest[cell]["seconds"]):
            fastest[cell] = row
    return list(fastest.values())


def save(rows: Sequence[Row]) -> str:
    """Write the best rows into the user's table; returns its path. Raises OutputError where that fails."""
    about = {"measured": True, **record.origin("cuda")}
    return str(write_user_table(arch_of(torch.device("cuda", 0)), [entry(row) for row in best(rows)], about))


def entry(row: Row) -> dict[str, Any]:
    """A row as an entry of a config table."""
    config = {name: row[name] for name in ("BM", "BN", "num_warps", "num_stages", "loader")}
    dtype = str(DTYPES[row["dtype"]]).removeprefix("torch.")
    return {
        "kernel": row["kernel"],
        "dtype": dtype,
        "dim": row["dim"],
        **config,
        "measured": True,
        "seconds": float(f"{row['seconds']:.4g}"),
    }


# ---------------------------------------------------------------------------------------------------------------- calls
class _Only(Config):
    """A config whose failure is an error: launches have no smaller one to turn to."""

    def smaller(self) -> "Config":
        return self


@contextlib.contextmanager
def forced(kernel: str, config: Config) -> Iterator[None]:
    """Launches of a kernel take `config`, cut to the plan's tiles, and fail with BackendError where it does not run."""
    from gensparse.kernels.triton import launch

    before, remembered = launch.config_for, launch._smaller.copy()

    def only(case: Case) -> Config:
        if case.kernel != kernel:
            return before(case)
        return _Only(**asdict(config)).fitted(case.tile_m, case.tile_n)

    launch.config_for = only
    launch._smaller.clear()
    try:
        yield
    finally:
        launch.config_for = before
        launch._smaller.clear()
        launch._smaller.update(remembered)


class _Call:
    """One kernel on random tensors, with all that it needs made beforehand."""

    def __init__(self, size: str, dtype: str, kernel: str, dim: int, device: str) -> None:
        layout = SMALL if size == "small" else LARGE
        self.layout, self.pattern, self.kernel = layout, PATTERN[size], kernel
        self.plan: Plan = build_plan(self.pattern, layout).to(device).with_boxes()
        heads = HEADS[size]
        self.tensors = inputs(layout, heads, dim, DTYPES[dtype], device)
        self.d_out = inputs(layout, heads, dim, DTYPES[dtype], device, seed=1)[0]
        self.schedule = Schedule(self.plan.pieces, self.plan.turned, self.plan.turned_pieces)

    def forward(self) -> tuple[Tensor, Tensor]:
        from gensparse.kernels.triton.forward import forward

        return forward(*self.tensors, self.plan.lists, self.plan.pieces, boxes=self.plan.boxes)

    def why_no_boxes(self, config: Config) -> str | None:
        """Why a config that asks for boxes would run by rows, or None."""
        from gensparse.kernels.triton.boxes import why_not

        if config.loader != "boxes":
            return None
        _, k, v = self.tensors
        return self.plan.boxes_refused or why_not(k, v, self.plan.boxes, config, arch_of(k.device))

    def run(self) -> tuple[Tensor, ...]:
        """The result that the kernel makes: out, dq, or dk and dv."""
        if self.kernel == "forward":
            return self.forward()[:1]
        from gensparse.kernels.triton.backward import backward

        if not hasattr(self, "results"):
            self.results = self.forward()
        out, lse = self.results
        given = (self.d_out, torch.zeros_like(lse), *self.tensors, out, lse)
        turned, pieces = self.schedule.turned, self.schedule.turned_pieces
        dq, dk, dv, _ = backward(*given, self.plan.lists, self.schedule.pieces, turned, pieces)
        return (dq,) if self.kernel == "dq" else (dk, dv)

    def error(self) -> float:
        """Largest relative error of `run` against dense attention in fp64, in memory that held NaN."""
        with poisoned_memory():
            found = self.run()
        allowed = torch.from_numpy(self.pattern.dense_mask(self.layout)).to(self.tensors[0].device)
        wide = [x.double().requires_grad_() for x in self.tensors]
        out, _ = reference.attend(*wide, allowed)
        if self.kernel == "forward":
            return relative_error(found[0], out.detach())
        grads = torch.autograd.grad(out, wide, self.d_out.double())
        wanted = grads[:1] if self.kernel == "dq" else grads[1:]
        errors = [relative_error(x, want) for x, want in zip(found, wanted, strict=True)]
        return max(error if error == error else float("inf") for error in errors)


HEADER = ("kernel", "dtype", "head dim", "BM", "BN", "warps", "stages", "loader", "ms", "error", "note")


def table_rows(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """What a person reads of the rows."""
    return [
        (
            *(str(row[name]) for name in ("kernel", "dtype", "dim", "BM", "BN", "num_warps", "num_stages", "loader")),
            f"{row['seconds'] * 1e3:.3f}" if row.get("seconds") else "",
            f"{row['error']:.1e}" if row.get("error") is not None else "",
            row.get("note", ""),
        )
        for row in rows
    ]
