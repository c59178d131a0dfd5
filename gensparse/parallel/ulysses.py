"""Ulysses: every process attends with some of the heads over the whole sequence (Jacobs et al. 2309.14509).

Two all-to-all exchanges per call. Before attention a process gives away its tokens of the others' heads and gets the
others' tokens of its own heads; afterwards the outputs go back. The gathered sequence holds the parts of all processes
one after the other, which `Layout.ulysses` describes. Nothing is exchanged about sizes: the layout tells them.
"""

from itertools import groupby

import torch
from torch import Tensor

from gensparse.layout import Layout, Segment
from gensparse.parallel.team import Team


def divided(layout: Layout, size: int) -> Layout:
    """The layout of a gathered sequence, for models that divide their text and their pictures each on its own.

    Raises:
        ConfigError: text or picture has fewer tokens than there are processes.
    """
    return Layout.ulysses(layout, size, streams=streams(layout))


def streams(layout: Layout) -> tuple[int, ...]:
    """How many consecutive segments each divided tensor holds: text in one, the picture and its references in one."""

    def is_text(segment: Segment) -> bool:
        return segment.kind == "text"

    return tuple(len(list(run)) for _, run in groupby(layout.segments, is_text))


def gather(x: Tensor, team: Team, parts: tuple[int, ...]) -> Tensor:
    """x [B, own tokens, heads, D] -> [B, all tokens, own heads, D].

    Args:
        parts: tokens of every process.
    """
    batch, _, heads, dim = x.shape
    shares = [team.share(heads, rank) for rank in range(team.size)]
    given = [x[:, :, share].transpose(0, 1).reshape(-1) for share in shares]
    mine = shares[team.rank].stop - shares[team.rank].start
    sizes = [part * batch * mine * dim for part in parts]
    return _exchanged(given, sizes, team).view(sum(parts), batch, mine, dim).transpose(0, 1)


def scatter(x: Tensor, team: Team, parts: tuple[int, ...], heads: int) -> Tensor:
    """x [B, all tokens, own heads, D] -> [B, own tokens, heads, D], the way back of `gather`.

    Args:
        heads: of all processes together.
    """
    batch, dim, tokens = x.shape[0], x.shape[3], parts[team.rank]
    given = [part.permute(2, 1, 0, 3).reshape(-1) for part in x.split(parts, dim=1)]
    shares = [team.share(heads, rank) for rank in range(team.size)]
    sizes = [(share.stop - share.start) * tokens * batch * dim for share in shares]
    return _exchanged(given, sizes, team).view(heads, tokens, batch, dim).permute(2, 1, 0, 3)


def gather_keys(bias: Tensor, team: Team, parts: tuple[int, ...]) -> Tensor:
    """bias [B|1, H|1, own tokens] of a process's own keys -> [B|1, own heads|1, all tokens]."""
    own = bias.permute(2, 0, 1).reshape(-1)
    rows = bias.shape[:2]
    sizes = [part * rows[0] * rows[1] for part in parts]
    everywhere = _exchanged([own] * team.size, sizes, team).view(sum(parts), *rows).permute(1, 2, 0)
    return everywhere if rows[1] == 1 else everywhere[:, team.share(rows[1])]


def _exchanged(given: list[Tensor], sizes: list[int], team: Team) -> Tensor:
    """What the others give this process, one after the other: `given` and `sizes` by process, flat."""
    import torch.distributed._functional_collectives as collectives  # loads torch's compiler

    sent = [part.numel() for part in given]
    received = collectives.all_to_all_single_autograd(torch.cat(given), sizes, sent, team.group)
    return collectives.wait_tensor(received)
