"""The arguments that all kernels share, as launches want them."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..lists import Pieces, TileLists
from .loaders import load_group
from .tune import Case, Config, arch_of, padded_dim

INTERPRETED = not isinstance(load_group, triton.runtime.JITFunction)
LOG2E = 1.4426950408889634


class Inputs(NamedTuple):
    """Facts about a call, derived from shapes only: nothing here reads a tensor's values.

    Args:
        heads, repeat, rows: H, query heads per key head, B * H.
        dim: D.
        tile_m, tile_n: slots of the plan's tiles.
        bias, groups: the tensors, or stand-ins that no kernel reads.
        bias_strides, group_strides: [B, H, Nk] and [B, H]; 0 along axes of length 1.
        scale: factor of the logits.
    """

    heads: int
    repeat: int
    rows: int
    dim: int
    dtype: torch.dtype
    device: torch.device
    tile_m: int
    tile_n: int
    partial: bool
    bias: Tensor
    groups: Tensor
    bias_strides: tuple[int, ...]
    group_strides: tuple[int, ...]
    has_bias: bool
    has_groups: bool
    scale: float

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lists: TileLists,
        groups: Tensor | None,
        key_bias: Tensor | None,
        scale: float | None,
    ) -> "Inputs":
        batch, _, heads, dim = q.shape
        used = groups is not None and len(lists.row_ptr) > 1
        bias = q if key_bias is None else key_bias.float()
        return cls(
            heads=heads,
            repeat=heads // max(1, k.shape[2]),
            rows=batch * heads,
            dim=dim,
            dtype=q.dtype,
            device=q.device,
            tile_m=lists.q_rows.shape[1],
            tile_n=lists.k_rows.shape[1],
            partial=len(lists.atlas) > 0,
            bias=bias,
            groups=groups if used else lists.row_ptr,
            bias_strides=(0, 0, 0) if key_bias is None else bias.expand(batch, heads, -1).stride(),
            group_strides=groups.expand(batch, heads).stride() if used else (0, 0),
            has_bias=key_bias is not None,
            has_groups=used,
            scale=dim**-0.5 if scale is None else scale,
        )

    @property
    def factor(self) -> float:
        """|scale| in units of log2."""
        return abs(self.scale) * LOG2E

    @property
    def negate(self) -> bool:
        """Kernels take a factor that is not negative, and q with its sign."""
        return self.scale < 0

    @property
    def flags(self) -> dict[str, Any]:
        return {"HAS_BIAS": self.has_bias, "HAS_GROUPS": self.has_groups}

    @property
    def shape(self) -> dict[str, Any]:
        """Compile-time constants of the attention kernels."""
        return {
            "D": self.dim,
            "BD": padded_dim(self.dim),
            "TILE_M": self.tile_m,
            "TILE_N": self.tile_n,
            # the interpreter multiplies the bit patterns of bf16
            "UPCAST": INTERPRETED and self.dtype == torch.bfloat16,
            "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        }

    @staticmethod
    def blocks(config: Config) -> dict[str, int]:
        """Launch arguments of a config."""
        return {
            "BM": config.BM,
            "BN": config.BN,
            "STAGES": config.num_stages,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }

    def case(self, kernel: str) -> Case:
        """What the config tables are asked."""
        dtype = str(self.dtype).removeprefix("torch.")
        arch = arch_of(self.device)
        dim = padded_dim(self.dim)
        return Case(kernel, arch, dtype, dim, self.partial, self.has_bias, self.tile_m, self.tile_n)

    def parts(self, pieces: Pieces, tile: int, *dims: int) -> Tensor:
        """fp32 [B * H, slots, tile, *dims] for the parts of split lists; nothing reads slots that nobody writes."""
        return torch.empty((self.rows, pieces.slots, tile, *dims), dtype=torch.float32, device=self.device)
