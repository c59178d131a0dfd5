"""UNets of Stable Diffusion 1.5, 2 and XL, their ControlNets, and AnimateDiff: self-attention at several resolutions.

Every level of the UNet is a role of its own, "level0" (the latent cells) and up. Which level a module is at follows
from its place in the model, because token counts can be equal at different levels. Cross-attention of a level has the
role "cross level0" and so on.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from gensparse.errors import ConfigError, LayoutMismatchError
from gensparse.families.base import CROSS, Family, Layouts, TensorMemo, needed, whole_tokens
from gensparse.families.latents import trained_tokens
from gensparse.layout import Layout

_SITE = re.compile(r"(down_blocks\.(\d+)|mid_block|up_blocks\.(\d+))\.attentions\..*transformer_blocks\.\d+\.attn[12]")
_HALVING = {
    "CrossAttnDownBlock2D",
    "DownBlock2D",
    "AttnDownBlock2D",
    "CrossAttnDownBlockMotion",
    "DownBlockMotion",
}
"""Down blocks that end in a convolution of stride 2 and width 3."""


def sites(model: Any, names: Iterable[str]) -> dict[str, str]:
    """`attn1` of every transformer block by level, in the order of the computation: down, middle, up.

    Motion modules, and `attn1` that looks at the text, are no sites.
    """
    own = (name for name in names if name.endswith(".attn1"))
    return _levels(model, (name for name in own if not _reads_text(model, name)), "level")


def cross(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Every attention of a transformer block that looks at the text, `attn2` in most UNets, by level."""
    return _levels(model, (name for name in names if _reads_text(model, name)), f"{CROSS}level")


def _reads_text(model: Any, name: str) -> bool:
    return _SITE.fullmatch(name) is not None and getattr(model.get_submodule(name), "is_cross_attention", False)


def _levels(model: Any, names: Iterable[str], prefix: str) -> dict[str, str]:
    """Role by name, in the order of the computation."""
    last = len(model.config["down_block_types"]) - 1
    parts: tuple[dict[str, str], ...] = ({}, {}, {})
    for name in names:
        place = _SITE.fullmatch(name)
        if place is None:
            continue
        _, down, up = place.groups()
        if down:
            parts[0][name] = f"{prefix}{int(down)}"
        elif up:
            parts[2][name] = f"{prefix}{last - int(up)}"
        else:
            parts[1][name] = f"{prefix}{last}"
    return {name: role for part in parts for name, role in part.items()}


def read_layouts(model: Any, bound: Mapping[str, Any], _memo: TensorMemo) -> Layouts:
    """Layouts from `sample` [B, C, H, W] (AnimateDiff: [B, C, F, H, W], whose frames attend one by one).

    Raises:
        LayoutMismatchError: no sample, one without rows and columns, or a UNet whose levels are not known.
    """
    (sample,) = needed("UNet", bound, "sample")
    if sample.ndim not in (4, 5):
        raise LayoutMismatchError(
            f"The UNet call has a sample of shape {tuple(sample.shape)}; pass (batch, channels, height, width)."
        )
    size, layouts = tuple(sample.shape[-2:]), {}
    types = model.config["down_block_types"]
    for level, kind in enumerate(types):
        if not all(size):
            raise LayoutMismatchError(
                f"The UNet has {len(types)} levels, but {sample.shape[-2]}x{sample.shape[-1]} latent cells have "
                f"nothing left at level {level}; pass a larger picture."
            )
        layouts[f"level{level}"] = Layout.image(*size)
        if level + 1 < len(types):
            size = tuple(_halved(axis, kind, model.config) for axis in size)
    return layouts


def layout_for(height: int, width: int, *, level: int = 0, n_text: int = 0, vae_scale: int = 8) -> Layout:
    """Layout of a picture of height x width pixels at one level of the UNet.

    Args:
        level: 0 for the latent cells, each further level halves them and rounds up. Stable Diffusion 1.5 attends at
            levels 0 to 3, XL at 1 and 2.
        n_text: text takes no part in self-attention, so its length does not matter.
        vae_scale: pixels per latent cell and axis.

    Raises:
        ConfigError: the picture holds no whole cell, or level is not an integer from 0 up.
    """
    if isinstance(level, bool) or not isinstance(level, int) or level < 0:
        raise ConfigError(f"UNet level={level!r} is not allowed; pass an integer from 0 up.")
    cells = whole_tokens("UNet", ("height", height, vae_scale), ("width", width, vae_scale))
    rows, columns = (-(-axis // 2**level) for axis in cells)
    return Layout.image(rows, columns)


def native_tokens(model: Any, _scheduler_config: Mapping[str, Any] | None = None) -> int:
    """Latent cells of the training size (`sample_size` of the UNet), the tokens of level 0.

    Args:
        model: a UNet, or a pipeline that has one.

    Raises:
        ConfigError: the config does not say it.
    """
    return trained_tokens("UNet", model, patch=None)


def coarseness(role: str) -> int:
    """Latent cells per token and axis at the sites of a role."""
    return 2 ** int(role.removeprefix(CROSS).removeprefix("level"))


def _halved(cells: int, kind: str, config: Mapping[str, Any]) -> int:
    """Cells of an axis behind a down block: a convolution of width 3 and stride 2, padded evenly or only at the end."""
    if kind not in _HALVING:
        raise LayoutMismatchError(
            f"The UNet has a {kind}, whose way of halving the picture is not known; such models run dense."
        )
    padding = config.get("downsample_padding", 1)
    return (cells + (2 * padding if padding else 1) - 3) // 2 + 1


FAMILY = Family(
    name="UNet",
    sites=sites,
    read_layouts=read_layouts,
    layout_for=layout_for,
    native_tokens=native_tokens,
    coarseness=coarseness,
    cross=cross,
    blocks=r".*\.attentions\..*transformer_blocks\.\d+",
)
