"""Helpers of the plan tests: what lowered forms spell out."""

import numpy as np

from gensparse.kernels.blocks import Work
from gensparse.plan import Plan


def lowered_mask(works: tuple[Work, ...], plan: Plan) -> np.ndarray:
    """The mask of a lowered form, bool [G, Nq, Nk] with tokens in segment order; every query appears at most once."""
    mask = np.zeros((plan.groups, plan.tokens, plan.keys), bool)
    for group, work in enumerate(works):
        seen = np.zeros(plan.tokens, int)
        for tiles in work.tiles:
            bias, hides = tiles.bias()
            q, k = (x.numpy() for x in tiles.rows(0, tiles.sizes[0]))
            block = np.ones((q.shape[1], k.shape[1]), bool) if bias is None else (bias == 0).numpy()
            assert hides == (not block.any(axis=1).all())
            for queries, keys in zip(q, k, strict=True):
                assert len(set(keys)) == len(keys)
                mask[group][np.ix_(queries, keys)] = block
                seen[queries] += 1
        for rows in work.dense:
            seen[slice(*rows.queries)] += 1
            for run in rows.keys:
                mask[group, slice(*rows.queries), slice(*run)] = True
        assert seen.max() <= 1
    return mask
