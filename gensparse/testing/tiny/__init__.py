"""Tiny complete pipelines with random weights, made offline: for tests and for `samples/ --tiny`.

One module per family, loaded on first use, with `denoiser` and `inputs`, and for the families in `PIPELINES` also with
`pipeline` and `call`.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gensparse.errors import ConfigError

IMAGES = {
    "flux": "gensparse.testing.tiny.flux",
    "flux_kontext": "gensparse.testing.tiny.flux_kontext",
    "chroma": "gensparse.testing.tiny.chroma",
    "flux2": "gensparse.testing.tiny.flux2",
    "sd15": "gensparse.testing.tiny.sd15",
    "sdxl": "gensparse.testing.tiny.sdxl",
    "sd3": "gensparse.testing.tiny.sd3",
    "sd35": "gensparse.testing.tiny.sd35",
    "pixart": "gensparse.testing.tiny.pixart",
    "auraflow": "gensparse.testing.tiny.auraflow",
    "qwenimage": "gensparse.testing.tiny.qwenimage",
    "lumina2": "gensparse.testing.tiny.lumina2",
    "cogview4": "gensparse.testing.tiny.cogview4",
    "cogview3plus": "gensparse.testing.tiny.cogview3plus",
    "zimage": "gensparse.testing.tiny.zimage",
    "hunyuanimage": "gensparse.testing.tiny.hunyuanimage",
    "sana": "gensparse.testing.tiny.sana",
    "hidream": "gensparse.testing.tiny.hidream",
}
"""Families of pictures -> their modules."""

VIDEOS = {
    "cogvideox": "gensparse.testing.tiny.cogvideox",
    "cosmos": "gensparse.testing.tiny.cosmos",
    "hunyuan_video": "gensparse.testing.tiny.hunyuan_video",
    "hunyuan_video15": "gensparse.testing.tiny.hunyuan_video15",
    "kandinsky5": "gensparse.testing.tiny.kandinsky5",
    "ltx": "gensparse.testing.tiny.ltx",
    "mochi": "gensparse.testing.tiny.mochi",
    "skyreels": "gensparse.testing.tiny.skyreels",
    "wan": "gensparse.testing.tiny.wan",
    "wan22": "gensparse.testing.tiny.wan22",
    "wan_i2v": "gensparse.testing.tiny.wan_i2v",
    "wan_vace": "gensparse.testing.tiny.wan_vace",
}
"""Families of videos -> their modules."""

TINY = {**IMAGES, **VIDEOS}
"""Every family -> its module."""

PIPELINES = frozenset(TINY) - {"cosmos"}
"""Families whose module has a complete pipeline; the others have a denoiser only."""

# older name -> (module, name there)
_EXPORTS = {
    "tiny_flux_pipeline": ("gensparse.testing.tiny.flux", "pipeline"),
    "tiny_flux_transformer": ("gensparse.testing.tiny.flux", "denoiser"),
    "tiny_flux_inputs": ("gensparse.testing.tiny.flux", "tiny_flux_inputs"),
    "tiny_vae": ("gensparse.testing.tiny.parts", "tiny_vae"),
    "with_noise": ("gensparse.testing.tiny.parts", "with_noise"),
}

__all__ = [
    "IMAGES",
    "PIPELINES",
    "TINY",
    "VIDEOS",
    "tiny_call",
    "tiny_denoiser",
    "tiny_flux_inputs",
    "tiny_flux_pipeline",
    "tiny_flux_transformer",
    "tiny_inputs",
    "tiny_pipeline",
    "tiny_vae",
    "with_noise",
]

if TYPE_CHECKING:
    from gensparse.testing.tiny.flux import denoiser as tiny_flux_transformer
    from gensparse.testing.tiny.flux import pipeline as tiny_flux_pipeline
    from gensparse.testing.tiny.flux import tiny_flux_inputs
    from gensparse.testing.tiny.parts import tiny_vae, with_noise


def tiny_pipeline(name: str, *, seed: int = 0, **options: Any) -> Any:
    """A complete pipeline of the family.

    Args:
        options: further options of the family's own `pipeline`.

    Raises:
        ConfigError: the family is unknown or has no pipeline.
    """
    module = _module(name)
    if name not in PIPELINES:
        known = ", ".join(sorted(PIPELINES))
        raise ConfigError(f"The family {name!r} has a tiny denoiser but no tiny pipeline; those with one are {known}.")
    return module.pipeline(seed=seed, **options)


def tiny_denoiser(name: str, *, seed: int = 0, **options: Any) -> Any:
    """The family's denoiser with noise on all weights, in eval mode.

    Raises:
        ConfigError: the family is unknown.
    """
    return _module(name).denoiser(seed=seed, **options)


def tiny_inputs(
    name: str, grid: tuple[int, int, int], *, text: int = 5, batch: int = 2, seed: int = 0, **options: Any
) -> dict[str, Any]:
    """Keyword arguments of the denoiser's forward.

    Args:
        grid: (F, H, W) tokens, F = 1 for pictures.
        text: text tokens; batch: pictures or videos in the batch.

    Raises:
        ConfigError: the family is unknown, or makes pictures and F is not 1.
    """
    module = _module(name)
    if name in VIDEOS:
        return module.inputs(*grid, text=text, batch=batch, seed=seed, **options)
    if grid[0] != 1:
        raise ConfigError(f"grid={grid} has {grid[0]} frames, but {name!r} makes pictures; pass (1, H, W).")
    return module.inputs(*grid[1:], text=text, batch=batch, seed=seed, **options)


def tiny_call(name: str) -> dict[str, Any]:
    """Arguments of a cheap call of the family's pipeline.

    Raises:
        ConfigError: the family is unknown.
    """
    return _module(name).call()


def _module(name: str) -> ModuleType:
    if name not in TINY:
        raise ConfigError(f"There is no tiny family {name!r}; known ones are {', '.join(sorted(TINY))}.")
    return import_module(TINY[name])


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        module, attribute = _EXPORTS[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module 'gensparse.testing.tiny' has no attribute {name!r}")
