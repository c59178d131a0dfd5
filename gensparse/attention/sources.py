"""Keys beside the own tokens, and biases of keys."""

from math import prod

import torch
from torch import Tensor

from gensparse.attention.call import Sources
from gensparse.errors import ConfigError
from gensparse.kernels.pool import cell_counts, pool_keys, pool_weighted
from gensparse.layout import Layout
from gensparse.patterns.base import Source
from gensparse.plan import Plan


def length_bias(lengths: Tensor, layout: Layout, segment: int) -> Tensor:
    """The key_bias of samples that fill a segment only partly (text of different lengths in one batch).

    Made on the device of `lengths` without waiting for it.

    Args:
        lengths: integer [B], valid tokens at the start of the segment in every sample.
        layout: of the call.
        segment: index of the segment in `layout`.

    Returns:
        fp32 [B, 1, S], 0 for valid keys and all other segments, -inf for the rest.

    Raises:
        ConfigError: lengths of another shape or dtype, or a segment the layout does not have.
    """
    if lengths.dim() != 1 or lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ConfigError(
            f"length_bias lengths are {lengths.dtype} {tuple(lengths.shape)}; pass integers of shape [B], the valid "
            "tokens of every sample."
        )
    if type(segment) is not int or not 0 <= segment < len(layout.segments):
        raise ConfigError(
            f"length_bias segment={segment!r} is not in the layout; pass an index from 0 to {len(layout.segments) - 1}."
        )
    bias = torch.zeros(len(lengths), 1, layout.tokens, device=lengths.device)
    first = 0
    for start, stop in layout.runs(segment):
        token = torch.arange(first, first + stop - start, device=lengths.device)
        bias[:, 0, start:stop].masked_fill_(token >= lengths[:, None], float("-inf"))
        first += stop - start
    return bias


def with_sources(
    k: Tensor, v: Tensor, plan: Plan, key_bias: Tensor | None, sources: Sources | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """k and v with the extra keys appended, and the bias over all of them."""
    given = dict(sources or {})
    unknown = sorted(set(given) - {source.name for source in plan.sources})
    if unknown:
        names = ", ".join(source.name for source in plan.sources)
        raise ConfigError(f"sources={unknown} are not in the plan; it has {names}.")
    made = [_source_keys(k, v, plan, source, given.get(source.name)) for source in plan.sources]
    bias = _source_bias(k, plan, key_bias)
    return torch.cat([k, *(keys for keys, _ in made)], 1), torch.cat([v, *(values for _, values in made)], 1), bias


def biased_pools(
    k: Tensor, v: Tensor, plan: Plan, key_bias: Tensor, sources: Sources | None = None
) -> tuple[Sources, Tensor]:
    """Averaged keys under a bias of the tokens they average, for a call in which that bias is a mask.

    Every token counts with the exponential of its bias, as it would as an exact key: hidden tokens are not averaged,
    and a cell of hidden tokens is hidden.

    Args:
        k, v: [B, S, H, D].
        key_bias: [B|1, H|1, S], one for all heads where k has fewer heads than q.
        sources: those that the caller gives; others with mean weights are made here.

    Returns:
        sources and key_bias [B|1, H|1, S + extra] for `sparse_attention`.

    Raises:
        ConfigError: a bias per head when there are fewer key heads.
    """
    if key_bias.shape[1] not in (1, k.shape[2]):
        raise ConfigError(
            f"key_bias for {key_bias.shape[1]} heads cannot weight the averages of {k.shape[2]} key heads; pass one "
            "for all heads."
        )
    made, biases = dict(sources or {}), [key_bias]
    for source in plan.sources:
        extra = key_bias.new_zeros(*key_bias.shape[:2], source.segment.length)
        if source.name not in made and source.weights == "mean" and source.of is not None:
            runs, shape = plan.layout.runs(source.of), plan.layout.segments[source.of].shape
            own = [torch.cat([x[:, first:last] for first, last in runs], 1) for x in (k, v)]
            weight = torch.cat([key_bias[..., first:last] for first, last in runs], -1)
            pooled = [pool_weighted(x, shape, source.cells, weight, source.shift) for x in own]
            made[source.name] = (pooled[0][0], pooled[1][0])
            counts = cell_counts(shape, source.cells, source.shift, k.device)
            extra = pooled[0][1] - counts.to(pooled[0][1]).log()
        biases.append(extra)
    return made, torch.cat(biases, -1)


def _source_keys(
    k: Tensor, v: Tensor, plan: Plan, source: Source, given: Tensor | tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    if isinstance(given, tuple):
        expected = (k.shape[0], source.segment.length, *k.shape[2:])
        if any(x.shape not in (expected, (1, *expected[1:])) for x in given):
            raise ConfigError(
                f"source {source.name!r} got {[tuple(x.shape) for x in given]}; pass k and v {expected}, or one sample "
                "for the whole batch."
            )
        return given[0].to(k).expand(expected), given[1].to(v).expand(expected)
    if source.of is None:
        raise ConfigError(
            f"source {source.name!r} is not made from the call's own keys; pass sources={{{source.name!r}: (k, v)}} "
            f"with {source.segment.length} tokens."
        )
    if given is None and source.weights != "mean":
        size = source.cells[0] * source.cells[1] * source.cells[2]
        raise ConfigError(
            f"source {source.name!r} needs weights; pass sources={{{source.name!r}: weights}} with {size} entries, or "
            "its (k, v)."
        )
    segment = plan.layout.segments[source.of]
    runs = plan.layout.runs(source.of)
    own = (
        torch.cat([x[:, first:last] for first, last in runs], 1) if len(runs) > 1 else x[:, slice(*runs[0])]
        for x in (k, v)
    )
    weights = None if given is None else given.to(k.device)
    pooled = [pool_keys(x, segment.shape, source.cells, weights, source.shift) for x in own]
    return pooled[0], pooled[1]


def _source_bias(k: Tensor, plan: Plan, key_bias: Tensor | None) -> Tensor | None:
    """The bias over own tokens and sources: key_bias, then what the sources add to the logits of their keys."""
    biased = any(source.bias != 0.0 for source in plan.sources)
    if key_bias is not None and key_bias.shape[-1] == plan.keys and not biased:
        return key_bias
    if key_bias is None and not biased:
        return None
    extra = torch.cat([_own_bias(plan, source, k.device) for source in plan.sources])
    if key_bias is None:
        return torch.cat([extra.new_zeros(plan.tokens), extra])[None, None]
    if key_bias.shape[-1] == plan.keys:
        return torch.cat([key_bias[..., : plan.tokens], key_bias[..., plan.tokens :] + extra], -1)
    return torch.cat([key_bias, extra.to(key_bias.dtype).expand(*key_bias.shape[:-1], -1)], -1)


def _own_bias(plan: Plan, source: Source, device: torch.device) -> Tensor:
    """What a source adds to the logits of its keys, float64 [tokens]: a constant, or ln(tokens in every cell)."""
    if not isinstance(source.bias, str):
        return torch.full((source.segment.length,), float(source.bias), dtype=torch.float64, device=device)
    counts = cell_counts(plan.layout.segments[source.of].shape, source.cells, source.shift, device)
    whole = prod(source.cells) if source.bias == "log_share" else 1
    return (counts.double() / whole).log()
