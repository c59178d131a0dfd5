"""Queries and keys of attention modules, for maps that methods look at; the modules' own calls stay as they are."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn


class Given(NamedTuple):
    """What an attention module was called with: hidden states [B, N, C], and the text [B, L, C] or None."""

    hidden: Tensor
    text: Tensor | None


def given_to(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Given | None:
    """The arguments of an attention module's call, as a hook gets them; None for hidden states of another form."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    text = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
    text = text[0] if isinstance(text, tuple) else text  # with image prompts behind it
    return Given(hidden, text) if isinstance(hidden, Tensor) and hidden.dim() == 3 else None


def queries_and_keys(module: Any, hidden: Tensor, text: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """q [B, N, H, D] and k [B, L, H, D] as the module makes them; of its own tokens without text.

    Only of modules like those of UNets: projections, perhaps norms, no rotary embedding.
    """
    source = hidden if text is None else text
    if text is not None and getattr(module, "norm_cross", None):
        source = module.norm_encoder_hidden_states(text)
    q, k = (layer(x).unflatten(-1, (module.heads, -1)) for layer, x in ((module.to_q, hidden), (module.to_k, source)))
    norms = getattr(module, "norm_q", None), getattr(module, "norm_k", None)
    q, k = (x if norm is None else norm(x) for x, norm in zip((q, k), norms, strict=True))
    return q, k


def partner(model: nn.Module, site: str) -> nn.Module | None:
    """The cross-attention of the block that a self-attention module is in."""
    block = model.get_submodule(site.rpartition(".")[0])
    cross = getattr(block, "attn2", None)
    return cross if getattr(cross, "processor", None) is not None else None
