"""Words of the prompt that only one part of the picture reads, in a cross-attention call."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gensparse.attention import sparse_attention
from gensparse.errors import LayoutMismatchError
from gensparse.layout import Layout
from gensparse.patterns import Reference, References
from gensparse.plan import build_plan
from gensparse.processors.masks import key_bias

TEXT = "text"


@dataclass(frozen=True, eq=False)
class Confined:
    """Words of an object, hidden from all queries outside of its place (PrimeComposer, arXiv 2403.05053).

    Args:
        words: places in the text, of every picture of the conditional half; () leaves a picture as it is.
        inside: bool [N], the queries that read them.
    """

    words: tuple[tuple[int, ...], ...]
    inside: np.ndarray

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """q [B, N, H, D] of the half over k, v [B, L, H, D] of the text, [B, N, H, D].

        Args:
            mask: of the text, as scaled_dot_product_attention takes it.

        Raises:
            LayoutMismatchError: a mask that differs from query to query.
        """
        bias = None if mask is None else key_bias(mask)
        if mask is not None and bias is None:
            raise LayoutMismatchError("The attention mask differs from query to query; words cannot be confined then.")
        out = torch.empty_like(q)
        for words in dict.fromkeys(self.words):
            rows = [number for number, own in enumerate(self.words) if own == words]
            own = bias if bias is None or len(bias) == 1 else bias[rows]
            out[rows] = self._one(q[rows], k[rows], v[rows], words, own, scale)
        return out

    def _one(
        self, q: Tensor, k: Tensor, v: Tensor, words: tuple[int, ...], bias: Tensor | None, scale: float | None
    ) -> Tensor:
        """Pictures with the same words."""
        tokens, length = q.shape[1], k.shape[1]
        own = np.isin(np.arange(length), words)
        data = {"open": ~own, "words": own, "inside": np.asarray(self.inside, bool)}
        shown = (
            Reference(TEXT, length=length, keys="open"),
            Reference(TEXT, length=length, keys="words", queries="inside"),
        )
        plan = build_plan(References(shown), Layout.image(1, tokens), data=data, device=q.device)
        if bias is not None:  # of the keys behind those of the queries' own tokens, which nobody sees
            bias = torch.cat([bias.new_zeros(*bias.shape[:2], tokens), bias], -1)
        return sparse_attention(q, q, q, plan, scale=scale, key_bias=bias, sources={TEXT: (k, v)})
