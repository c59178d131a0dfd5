"""How an autoencoder is cut into tiles: a value with a short text form, and what "auto" means for a picture."""

import re
from dataclasses import dataclass

from gensparse.errors import ConfigError, short

MODES = ("exact", "feather", "synced")
SMALLEST, LARGEST = 64, 8192  # pixels of a tile's side
OVERLAP = 0.25
UNTILED_AREA = 1024 * 1024  # pixels up to which "auto" takes one piece
AUTO_TILE = 1024  # blended tiles: what autoencoders were trained for
EXACT_TILE, EXACT_TILE_CPU = 768, 256  # about 1.1 GiB on a GPU; small tiles stay in a CPU's cache

FORMS = "auto, none, 512, feather, feather:512, feather:512:0.25 or synced:512"


@dataclass(frozen=True)
class Tiling:
    """Tiles of an autoencoder.

    Args:
        mode: "exact" (equal to one piece), "feather" (tiles on their own, blended) or "synced" (blended, with the
            statistics of every GroupNorm over all tiles).
        tile: side in pixels of the picture.
        overlap: share of a tile's side that the next one covers too; exact tiles have no use for it.

    Raises:
        ConfigError: a mode that does not exist, or a number outside its range.
    """

    mode: str = "exact"
    tile: int = AUTO_TILE
    overlap: float = OVERLAP

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"The mode of VAE tiles is {short(self.mode)}; choose one of {', '.join(MODES)}.")
        if isinstance(self.tile, bool) or not isinstance(self.tile, int) or self.tile < 1:
            raise ConfigError(f"A VAE tile is {short(self.tile)}; give at least one pixel.")
        if not 0 <= self.overlap <= 0.5:
            raise ConfigError(f"The overlap of VAE tiles is {self.overlap}; give a share of the tile from 0 to 0.5.")

    def __str__(self) -> str:
        if self.mode == "exact":
            return str(self.tile)
        return f"{self.mode}:{self.tile}" + (f":{self.overlap:g}" if self.overlap != OVERLAP else "")


def parse_tiling(text: int | str | None) -> Tiling | str | None:
    """Read pixels, "feather", "synced:512", "feather:512:0.25" as a `Tiling`; "auto" as itself, "none" as None.

    Raises:
        ConfigError: anything else.
    """
    if text is None or text == "none":
        return None
    if text == "auto":
        return "auto"
    if isinstance(text, int):
        return _asked(Tiling(tile=text))
    if not isinstance(text, str):
        raise ConfigError(f"VAE tiles are {short(text)}; give {FORMS}.")
    match = re.fullmatch(r"(?:(feather|synced)(?::(\d{1,5}))?(?::(0?\.\d{1,4}|0))?|(\d{1,5}))", text)
    if match is None:
        raise ConfigError(f"VAE tiles are {short(text)}; give {FORMS}.")
    mode, side, overlap, exact = match.groups()
    if exact is not None:
        return _asked(Tiling(tile=int(exact)))
    return _asked(Tiling(mode, int(side or AUTO_TILE), OVERLAP if overlap is None else float(overlap)))


def _asked(tiling: Tiling) -> Tiling:
    if not SMALLEST <= tiling.tile <= LARGEST:
        raise ConfigError(f"A VAE tile is {tiling.tile} pixels; give {SMALLEST} to {LARGEST}.")
    return tiling


def choose_tiling(
    wanted: int | str | None, size: tuple[int, int], *, cpu: bool, in_place: bool, exact: bool
) -> Tiling | None:
    """The tiles of a picture of `size` = (height, width); None is one piece.

    Args:
        wanted: as for `parse_tiling`.
        cpu: the autoencoder computes on a CPU.
        in_place: its weights stay on their device between calls: exact and synced tiles run its layers one by one.
        exact: its class is one that exact tiles know.

    Raises:
        ConfigError: tiles were asked for that need the weights in place, and they are not.
    """
    asked = parse_tiling(wanted)
    if asked is None or (asked == "auto" and size[0] * size[1] <= UNTILED_AREA):
        return None
    if not isinstance(asked, Tiling):
        if not (in_place and exact):
            return Tiling("feather")
        return Tiling(tile=EXACT_TILE_CPU if cpu else EXACT_TILE)
    if asked.mode != "feather" and not in_place:
        raise ConfigError(
            f"vae_tile={wanted} asks for {asked.mode} tiles, but the autoencoder is offloaded piece by piece; "
            "leave the VAE out of the offloading, or use vae_tile='feather'."
        )
    return asked
