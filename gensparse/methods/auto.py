"""auto: dense where that is cheaper, else a window per head by a measured profile: pairs go where most is lost."""

import math
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from gensparse.errors import ConfigError
from gensparse.layout import Grid, Layout
from gensparse.methods.base import START, At, Dense, Method, Place, Subject
from gensparse.methods.checks import whole
from gensparse.methods.pictures import over_pictures
from gensparse.methods.profile import FILE_NAME, GridProfile, Profile
from gensparse.patterns import Box, Pattern, PerHead

_MOST_USEFUL = 0.6  # a plan that computes more of all pairs than this is no faster than one dense call


@dataclass(frozen=True)
class Auto(Method):
    """Dense up to `dense_below` tokens; above, every head sees text and a window of its own.

    Windows are the cheapest ones that lose little enough over all heads: whoever loses most per pair gets more. What
    they lose is read from the model's profile, which `gensparse calibrate` measures: sampled queries, exact over all
    keys. Without a profile, all heads get a window as wide as the picture the model was trained on. This method is
    ours; only it may run dense by its own choice.

    References of the target's grid are seen through the same windows, others wholly (see `methods.pictures`).

    Args:
        error: relative error of attention's output that is acceptable, root mean square over all heads, from 0 to 1.
        density: share of the query-key pairs at most; where it is given, the windows fit it whatever the error.
        dense_below: tokens up to which dense attention is cheaper.
        profile: path of a profile; by default the one in the model's folder, if there is one.

    Raises:
        ConfigError: a setting out of range, or a profile that cannot be read or is of another model.
    """

    name: ClassVar[str] = "auto"
    edits: ClassVar[bool] = True
    audit: ClassVar[int] = 8
    paper: ClassVar[str] = "ours; not published"
    licence: ClassVar[str] = "nothing of others"
    use: ClassVar[str] = (
        "When you do not want to choose: dense at small sizes, above them the smallest windows that a measured "
        "profile allows. Run `gensparse calibrate` on your model first."
    )

    error: float = 0.2
    density: float | None = None
    dense_below: int = 8192
    profile: str | None = None

    def __post_init__(self) -> None:
        _share("error", self.error)
        if self.density is not None:
            _share("density", self.density)
        whole(self.name, "dense_below", self.dense_below, low=0)
        if self.profile is not None and not isinstance(self.profile, str):
            raise ConfigError(f"auto profile={self.profile!r} is not allowed; pass the path of a profile.")

    def resolved(self, subject: Subject) -> "_Resolved":  # type: ignore[override]
        chosen = self.planned(profile_beside(subject.model), subject.native_tokens)
        if chosen.measured is None:
            return chosen
        layers = {layer.name for entry in chosen.measured.grids for layer in entry.layers}
        missing = layers - {name for name, _ in subject.model.named_modules()}
        if missing:
            raise ConfigError(
                f"The profile of {chosen.measured.model} has a layer {sorted(missing)[0]}, which this "
                f"{type(subject.model).__name__} does not; calibrate this model."
            )
        return chosen

    def planned(self, beside: str | None, native_tokens: int | None) -> "_Resolved":
        """This method for a model whose weights need not be there.

        Args:
            beside: path of the profile in the model's folder; the method's own comes first.
            native_tokens: picture tokens at the model's training size.

        Raises:
            ConfigError: the profile cannot be read.
        """
        path = self.profile or beside
        measured = None if path is None else Profile.load(path)
        return _Resolved(self.error, self.density, self.dense_below, self.profile, measured, native_tokens)

    def pattern(self, layout: Layout, at: At = START) -> Pattern | Dense:
        if layout.tokens <= self.dense_below:
            return Dense(f"auto: dense is cheaper up to {self.dense_below} tokens")
        raise ConfigError("auto looks at the model before it chooses; pass it to gensparse.apply().")


@dataclass(frozen=True)
class _Resolved(Auto):
    """`Auto` on its model."""

    measured: Profile | None = None
    native_tokens: int | None = None

    def kind(self, place: Place) -> Hashable:
        return place.name if self.measured is not None else None

    def pattern(self, layout: Layout, at: At = START) -> Pattern | Dense:
        if layout.tokens <= self.dense_below:
            return Dense(f"auto: dense is cheaper up to {self.dense_below} tokens")
        if self.measured is None:
            return self._native_window(layout)
        menu, _, share = self._choice(layout)
        if share > _MOST_USEFUL:
            return Dense(f"auto: windows within error {self.error:g} would compute {share:.0%} of all pairs")
        parts = tuple(over_pictures(window, layout) for window in menu)
        return parts[0] if len(parts) == 1 else PerHead(parts)

    def heads(self, at: At, heads: int) -> tuple[int, ...] | None:
        if self.measured is None or at.layout is None:
            return None
        menu, entries, _ = self._choice(at.layout)
        # a layer that was not measured gets the largest window of the menu
        own = entries.get(str(at.kind), (len(menu) - 1,) * heads)
        if len(own) != heads:
            raise ConfigError(
                f"The profile has {len(own)} heads in {at.kind}, but the model has {heads}; calibrate this model."
            )
        return None if len(menu) == 1 else own

    def predicted_error(self, layout: Layout) -> float | None:
        """Relative error of the heads' outputs that the profile predicts on `layout`; None without a profile."""
        if self.measured is None:
            return None
        entry, choice, _ = _chosen(self.measured, layout, self.error, self.density)
        return entry.predicted(choice)

    def share(self, layout: Layout) -> float:
        """Share of all query-key pairs that is computed on `layout`, over all heads; 1 where dense runs."""
        if isinstance(self.pattern(layout), Dense):
            return 1.0
        if self.measured is None:
            from gensparse.plan import build_plan  # brings torch, which methods do without

            return float(build_plan(self.pattern(layout), layout).stats()["density"])
        return self._choice(layout)[2]

    def to_dict(self) -> dict[str, Any]:
        return Auto(self.error, self.density, self.dense_below, self.profile).to_dict()

    def _choice(self, layout: Layout) -> tuple[tuple[Box, ...], dict[str, tuple[int, ...]], float]:
        """(menu of windows, layer name -> entry of the menu for every head, share of all pairs)."""
        assert self.measured is not None, "asked for only with a profile"
        entry, choice, share = _chosen(self.measured, layout, self.error, self.density)
        used = sorted({window for row in choice for window in row})
        menu = tuple(_box(entry, window, layout.grid) for window in used)
        rows = (tuple(used.index(window) for window in row) for row in choice)
        return menu, {layer.name: row for layer, row in zip(entry.layers, rows, strict=True)}, share

    def _native_window(self, layout: Layout) -> Pattern | Dense:
        if self.native_tokens is None:
            return Dense("auto: neither a profile nor the model's training size is known; calibrate this model")
        radius = max(1, round(math.sqrt(self.native_tokens) / 2))
        return over_pictures(Box(radius), layout).clamped(layout.grid)


def _box(entry: GridProfile, window: int, grid: Grid) -> Box:
    """A window of the profile on a grid; the one behind the last is the whole grid."""
    radii = entry.windows[window] if window < len(entry.windows) else grid
    return Box(tuple(max(1, min(r, n - 1)) for r, n in zip(radii, grid, strict=True)))


@lru_cache(maxsize=64)
def _chosen(
    profile: Profile, layout: Layout, error: float, density: float | None
) -> tuple[GridProfile, tuple[tuple[int, ...], ...], float]:
    """The entry of the profile for a layout, the window of every head, and the share of pairs they compute."""
    entry = profile.nearest(layout.grid)
    shares = [_share_of(entry, w, layout) for w in range(len(entry.windows) + 1)]
    choice = entry.choose(error, shares, density)
    picked = [shares[w] for row in choice for w in row]
    return entry, choice, sum(picked) / len(picked)


def _share_of(entry: GridProfile, window: int, layout: Layout) -> float:
    """Share of all pairs that a head with this window computes: inside the window between pictures of the target's
    grid, and all with text and other references."""
    pairs = 1
    radii = entry.windows[window] if window < len(entry.windows) else layout.grid
    for radius, size in zip(radii, layout.grid, strict=True):
        pairs *= sum(min(i + radius, size - 1) - max(i - radius, 0) + 1 for i in range(size))
    alike = 1 + sum(segment.kind == "reference" and segment.grid == layout.grid for segment in layout.segments)
    windowed, tokens = alike * math.prod(layout.grid), layout.tokens
    rest = tokens - windowed
    return (alike**2 * pairs + 2 * windowed * rest + rest * rest) / tokens**2


def profile_beside(model: Any) -> str | None:
    """Path of the profile in the folder a model (a denoiser) was loaded from, if there is one."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or ""
    folders = (Path(name), Path(name).parent) if name else ()
    return next((str(folder / FILE_NAME) for folder in folders if (folder / FILE_NAME).is_file()), None)


def _share(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ConfigError(f"auto {name}={value!r} is not allowed; pass a number above 0 and up to 1.")
