"""A bank of keys and values: what sites keep of one denoiser call, to be seen as key sources in later ones.

Anchors of a low-resolution picture are recorded once for all steps, references of other pictures once per picture or
step. What is kept comes after norms and rotary embedding, as the attention call receives it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gensparse.errors import ConfigError
from gensparse.layout import Segment

Pair = tuple[Tensor, Tensor]


class Bank:
    """Keys and values by source and site.

    Args:
        device: where they are kept; None where they are computed. On another device they are copied at every use.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self._device = device
        self._segments: dict[str, dict[str, Segment]] = {}
        self._kept: dict[str, dict[str, Pair]] = {}

    def keep(self, role: str, site: str, segment: Segment, k: Tensor, v: Tensor) -> None:
        """Keep k and v [B, tokens, H, D] of a site as the source `segment.name`, instead of what it had."""
        self._segments.setdefault(role, {})[segment.name] = segment
        pair = tuple(x.detach().to(self._device or x.device, copy=True) for x in (k, v))
        self._kept.setdefault(site, {})[segment.name] = (pair[0], pair[1])

    def segments(self, role: str) -> tuple[Segment, ...]:
        """The sources that sites of a role have kept."""
        return tuple(self._segments.get(role, {}).values())

    def sources(self, site: str) -> dict[str, Pair]:
        """The sources of one site, by name."""
        return dict(self._kept.get(site, {}))

    def facts(self) -> dict[str, dict[str, Any]]:
        """Of every source: its tokens, their grid (rows, columns), and the memory that all sites keep of it."""
        segments = {own.name: own for kept in self._segments.values() for own in kept.values()}
        return {
            name: {
                "tokens": segment.length,
                "grid": list(segment.shape[-2:]),
                "bytes": sum(_bytes(x) for own in self._kept.values() for x in own.get(name, ())),
            }
            for name, segment in segments.items()
        }

    @property
    def bytes(self) -> int:
        """Memory of everything kept."""
        return sum(_bytes(x) for own in self._kept.values() for pair in own.values() for x in pair)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


class Record(NamedTuple):
    """What the sites of a role keep of their calls: the tokens of `segment`, the first at `start`."""

    bank: Bank
    role: str
    segment: Segment
    start: int

    @torch.compiler.disable
    def keep(self, site: str, k: Tensor, v: Tensor) -> None:
        """Keep the part of k and v [B, S, H, D] that was asked for."""
        part = slice(self.start, self.start + self.segment.length)
        self.bank.keep(self.role, site, self.segment, k[:, part], v[:, part])


class StepBank:
    """Keys and values of pictures by step, half of guidance, site and name: what one run keeps for later ones.

    Args:
        device: where they are kept, such as "cpu"; None where they are computed. Elsewhere they are copied at every
            use.

    `steps` is the length of the run that wrote it, None where nobody knew.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.device = device
        self._kept: dict[tuple[int, int], dict[tuple[str, str], Pair]] = {}
        self._names: dict[str, None] = {}
        self.steps: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the pictures, in the order in which they came."""
        return tuple(self._names)

    def keep(self, step: int, half: int, site: str, name: str, k: Tensor, v: Tensor) -> None:
        """Keep k and v [tokens, H, D] of a picture, instead of what it had."""
        pair = tuple(x.detach().to(self.device or x.device, copy=True) for x in (k, v))
        self._kept.setdefault((step, half), {})[site, name] = (pair[0], pair[1])
        self._names[name] = None

    def pair(self, step: int, half: int, site: str, name: str, like: Tensor) -> Pair:
        """What was kept, with the device and dtype of `like`.

        Raises:
            ConfigError: nothing was kept for this step, half, site or name.
        """
        kept = self._kept.get((step, half))
        if kept is None:
            steps = len({known for known, _ in self._kept})
            raise ConfigError(
                f"The bank holds {steps} steps and no {'conditional' if half else 'unconditional'} half of step "
                f"{step}; write it in a run of as many steps, with guidance where the later run has it."
            )
        if (site, name) not in kept:
            raise ConfigError(
                f"The bank holds nothing of {name!r} at {site} in step {step}; write it with the same method and "
                f"layers. It has {', '.join(self.names)}."
            )
        k, v = kept[site, name]
        return k.to(like), v.to(like)

    @property
    def bytes(self) -> int:
        """Memory of everything kept."""
        pairs = [pair for kept in self._kept.values() for pair in kept.values()]
        return sum(x.numel() * x.element_size() for pair in pairs for x in pair)
