"""The size at once, with stretched positions, in diffusers' own pipelines of image transformers with rotary positions.

A stock pipeline runs as it is; what does not reach beyond the trained size is exchanged while it does: the rotary
tables (YaRN, or another rule of `gensparse.highres.rope`), the time shift where it grows with the size, and attention.
"""

import copy
import functools
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch

from gensparse.attach import applied, attached
from gensparse.errors import ConfigError
from gensparse.families import TensorMemo, family_of
from gensparse.families.base import bound_call
from gensparse.highres.rope import DYPE_NOTICE
from gensparse.highres.stages import check_size
from gensparse.highres.stretched import Rotary, StandIn, check_rule
from gensparse.layout import Layout
from gensparse.methods import Method
from gensparse.pipelines.cascade import choose_attention
from gensparse.pipelines.registry import check_source

_LOG = logging.getLogger(__name__)

WAYS = ("direct", "none")
"""The size at once: with stretched positions, or with the model's own."""


class Direct:
    """Mixed into a diffusers text-to-image pipeline, in front of it.

    The pipeline says where its transformer has its positions (`_rotary`), how many latent cells a token has per axis
    (`_patch`) and, where its time shift is not the usual line, what it may be at most (`_largest_shift`).
    """

    _rotary: ClassVar[Rotary]
    attention_report: list[dict[str, Any]]

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        check_source(pipeline, cls)
        if "torch_dtype" not in kwargs:  # diffusers would cast the shared weights to float32
            kwargs.setdefault("dtype", pipeline.dtype)
        return super().from_pipe(pipeline, **kwargs)

    @property
    def _patch(self) -> int:
        return 2

    @property
    def token_size(self) -> int:
        """Pixels of a token's side; picture sizes are multiples of it."""
        return self.vae_scale_factor * self._patch

    @property
    def native_size(self) -> int:
        """Pixels per side at which the model was trained, as its configs say."""
        return round(math.sqrt(family_of(_plain(self.transformer)).native_tokens(self))) * self.token_size

    def __call__(
        self,
        *args: Any,
        highres: str = "direct",
        position: str = "auto",
        native_size: int | None = None,
        attention: Method | str | Mapping[str, Any] = "auto",
        dense_steps: int = 0,
        dense_layers: Sequence[int] = (),
        **kwargs: Any,
    ) -> Any:
        r"""
        Generate a picture of any size in one run. Up to the native size it is diffusers' pipeline to the bit.

        All arguments of diffusers' pipeline come first and mean the same.

        Args:
            highres (`str`, defaults to `"direct"`):
                "direct" stretches positions beyond the native size, "none" keeps the model's own. In both the time
                shift is never larger than at the native size.
            position (`str`, defaults to `"auto"`):
                Rotary rule, one of `gensparse.highres.stretched.POSITIONS`; auto is "yarn". The dy_ rules are DyPE,
                which is patent pending according to its authors.
            native_size (`int`, *optional*):
                Pixels per side at which the model was trained; by default what its configs say.
            attention (`str` or `Method`, defaults to `"auto"`):
                "dense", a method such as "neighborhood:window=64x64", or "auto": dense while that is cheaper.
            dense_steps (`int`), dense_layers (`Sequence[int]`):
                First steps, and blocks, that stay dense.

        Raises:
            ConfigError: a way, rule or size that cannot be.
        """
        size = self._asked_size(args, kwargs)
        if highres not in WAYS:
            raise ConfigError(
                f"highres={highres!r} does not exist for {type(self).__name__}, which has no stages; choose "
                f"{' or '.join(WAYS)}, or enlarge its picture with a pipeline that has (image=...)."
            )
        rule = "base" if highres == "none" else "yarn" if position == "auto" else position
        check_rule(rule)
        for side in size:
            if side is not None:
                check_size(side, side, self.token_size)
        if native_size is not None:
            check_size(native_size, native_size, self.token_size)
        native = (native_size or self.native_size) // self.token_size
        rows, cols = (native if side is None else side // self.token_size for side in size)
        method = choose_attention(attention, rows * cols, automatic=f"neighborhood:window={native}x{native}")
        if rule.startswith("dy_"):
            _LOG.warning(DYPE_NOTICE)
        self.attention_report = []
        with (
            self._shift_capped(native),
            self._positions(native, rule),
            self._sparse(method, attention == "auto", dense_steps, dense_layers) as handle,
        ):
            try:
                return super().__call__(*args, **kwargs)
            finally:
                facts = {"stage": 0, "height": rows * self.token_size, "width": cols * self.token_size}
                facts["method"] = "dense" if handle is None else handle.method.to_dict()
                self.attention_report.append({**facts, **({} if handle is None else handle.report())})

    def _asked_size(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int | None, int | None]:
        """(height, width) as they were asked for; TypeError for arguments that diffusers' pipeline does not have."""
        given = inspect.signature(super().__call__).bind_partial(*args, **kwargs).arguments
        return given.get("height"), given.get("width")

    # --- what is exchanged during a run

    @contextmanager
    def _sparse(self, method: Method | None, automatic: bool, dense_steps: int, dense_layers: Sequence[int]):
        """The attention of the run; what the user has applied is replaced only by a method that was asked for."""
        own = attached(self)
        if method is None or (automatic and own is not None):
            with nullcontext(own):
                yield own
            return
        with applied(self, method, dense_steps=dense_steps, dense_layers=dense_layers) as handle:
            yield handle

    @contextmanager
    def _positions(self, native: int, rule: str) -> Iterator[None]:
        """Positions of every call by its own grid; the model's own come back at the end."""
        model = _plain(self.transformer)
        if rule == "base":
            yield
            return
        owner, name = self._rotary.place(model)
        hook = _Stretching(self, native, rule)
        handle = model.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            if hook.changed:
                setattr(owner, name, hook.own)

    @contextmanager
    def _shift_capped(self, native: int) -> Iterator[None]:
        """A copy of the scheduler whose time shift stops where the trained size has it."""
        own = self.scheduler
        self.scheduler = capped(own, functools.partial(self._largest_shift, native**2))
        try:
            yield
        finally:
            self.scheduler = own

    def _largest_shift(self, tokens: int, steps: int) -> float:
        """mu at the native size, of `tokens` tokens, in a run of `steps` steps."""
        return float(self.scheduler.config.get("max_shift") or 1.15)

    def _noise_level(self) -> float:
        """sigma of the step that comes."""
        scheduler = self.scheduler
        index = scheduler.step_index if scheduler.step_index is not None else scheduler.begin_index or 0
        return float(scheduler.sigmas[index])


class _Stretching:
    """Forward pre-hook of the transformer: positions for the grid and the noise level of the call."""

    def __init__(self, pipe: Any, native: int, rule: str) -> None:
        self._pipe, self._native, self._rule = pipe, native, rule
        self._memo, self._made = TensorMemo(), {}
        self.own: Any = None
        self.changed = False

    def __call__(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        owner, name = self._pipe._rotary.place(model)
        grid = self._grid(model, bound_call(model, args, kwargs).arguments)
        if grid[0] * grid[1] <= self._native**2:
            if self.changed:
                setattr(owner, name, self.own)
            return
        if grid not in self._made:
            if self.changed:
                setattr(owner, name, self.own)
            self._made[grid] = self._stand_in(model, grid)
        if not self.changed:
            self.own, self.changed = getattr(owner, name), True
        time = self._pipe._noise_level() if self._rule.startswith("dy_") else 1.0
        setattr(owner, name, self._made[grid].at(time))

    def _stand_in(self, model: torch.nn.Module, grid: tuple[int, int]) -> StandIn:
        return self._pipe._rotary.stand_in(model, grid, self._native, self._rule)

    def _grid(self, model: torch.nn.Module, bound: Mapping[str, Any]) -> tuple[int, int]:
        """Rows and columns of tokens of the picture that is made."""
        layout = family_of(model).read_layouts(model, bound, self._memo)["joint"]
        layout = layout if isinstance(layout, Layout) else layout[0] if isinstance(layout, tuple) else layout.layout
        _, rows, columns = layout.segments[layout.target].shape
        return rows, columns


# --- pure helpers ---------------------------------------------------------------------------------------------------


def capped(scheduler: Any, largest: Callable[[int], float]) -> Any:
    """A copy of a scheduler that takes no larger mu than `largest` of the number of steps; other settings stay."""
    kind = type(scheduler)

    class Capped(kind):
        """The scheduler, with a time shift that stops at the trained size."""

        @functools.wraps(kind.set_timesteps)
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            mu = kwargs.get("mu")
            if mu is not None:
                given = inspect.signature(kind.set_timesteps).bind(self, *args, **kwargs).arguments
                listed = given.get("sigmas") if given.get("sigmas") is not None else given.get("timesteps")
                limit = largest(given.get("num_inference_steps") or len(listed))
                # at the trained size itself, mu is the limit up to rounding: those bits stay
                kwargs["mu"] = mu if mu <= limit * (1 + 1e-9) else limit
            super().set_timesteps(*args, **kwargs)

    Capped.__name__, Capped.__qualname__, Capped.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    out = copy.deepcopy(scheduler)
    out.__class__ = Capped
    return out


def _plain(model: torch.nn.Module) -> torch.nn.Module:
    return getattr(model, "_orig_mod", model)
