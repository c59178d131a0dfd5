"""What one attention call asks of a backend."""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Need:
    """The facts a backend looks at before it accepts a call.

    Args:
        dtype, device: of q ("cpu", "cuda", ...).
        arch: of the GPU ("sm_90", "gfx942", ...); "" where there is none.
        head_dim: D.
        queries, keys: tokens on each side, pooled and other extra keys included.
        density: allowed pairs / (queries * keys).
        groups: patterns in the plan's menu.
        bias: a key_bias is given.
        lse: the log-sum-exp is wanted.
        grad: a gradient is wanted.
        refused: lowered form ("halo", "partition") -> sentence why the plan has none; forms that exist are absent.
    """

    dtype: torch.dtype
    device: str
    head_dim: int
    queries: int
    keys: int
    density: float
    groups: int = 1
    bias: bool = False
    lse: bool = False
    grad: bool = False
    refused: dict[str, str] = field(default_factory=dict)
    arch: str = ""
