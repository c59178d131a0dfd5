"""Checks that every family has to pass, whatever its model: `from families.family_checks import ...`.

The reference is the model itself with a dense mask. It is put on the model from outside, by catching the calls of
scaled_dot_product_attention inside the attention modules, so no plan, kernel, site or processor of gensparse has a part
in it. Layouts are always given by the test, never taken from the family under test.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import gensparse
from gensparse.families import Layouts, TensorMemo, family_of
from gensparse.layout import Layout
from gensparse.methods import At, Clear, Dense, Method, Neighborhood, Place, SlidingWindow, Subject

WHOLE = (Clear(radius=1000), Neighborhood(window=1000), SlidingWindow(radius=1000))
"""Methods whose window covers every grid of a test."""

TOLERANCE = 1e-5


@torch.no_grad()
def output(model: nn.Module, inputs: Mapping[str, Any], *args: Any) -> Tensor:
    """Everything the denoiser returns: its picture, or where there are several tensors all of them, joined flat."""
    found = list(_tensors(model(*args, **inputs, return_dict=False)))
    return found[0] if len(found) == 1 else torch.cat([tensor.flatten() for tensor in found])


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for part in value:
            yield from _tensors(part)


def sites_of(model: nn.Module) -> dict[str, str]:
    """Name -> role of the attention modules that the family counts as sites."""
    names = [name for name, module in model.named_modules() if getattr(module, "processor", None) is not None]
    return family_of(model).sites(model, names)


def layouts_of(model: nn.Module, inputs: Mapping[str, Any], *args: Any) -> Layouts:
    """What the family reads from the arguments of a call."""
    bound = inspect.signature(type(model).forward).bind(model, *args, **inputs).arguments
    return family_of(model).read_layouts(model, bound, TensorMemo())


def positional(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The same call with as many positional arguments as the order of the signature allows."""
    args, rest = [], dict(inputs)
    for name in list(inspect.signature(type(model).forward).parameters)[1:]:
        if name not in rest:
            break
        args.append(rest.pop(name))
    return args, rest


class _Calls(TorchFunctionMode):
    """Catches attention calls while it is active; `module` is the attention module that is running."""

    def __init__(self) -> None:
        super().__init__()
        self.module: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and self.module is not None:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            return self.attend(self.module, **dict(zip(names, args, strict=False)), **kwargs)
        return func(*args, **kwargs)

    def attend(self, module: str, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, **kwargs)


@contextmanager
def _inside(model: nn.Module, names: Sequence[str], calls: _Calls) -> Iterator[None]:
    """`calls` is active, and knows which of the named modules runs."""

    def enter(name: str) -> Any:
        def hook(*_: Any) -> None:
            calls.module = name

        return hook

    def leave(*_: Any) -> None:
        calls.module = None

    modules = {name: model.get_submodule(name) for name in names}
    handles = [module.register_forward_pre_hook(enter(name)) for name, module in modules.items()]
    handles += [module.register_forward_hook(leave) for module in modules.values()]
    try:
        with calls:
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Masked(_Calls):
    """Every self-attention call of a site gets its dense mask."""

    def __init__(self, masks: Mapping[str, Sequence[Tensor]]) -> None:
        super().__init__()
        self.masks = masks
        self.seen: set[str] = set()

    def attend(self, module: str, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        given = kwargs.pop("attn_mask", None)
        if query.shape[-2] == key.shape[-2]:
            window = _batched(self.masks[module], query.shape[0], query.shape[-2])
            given = _both(given, window, query.shape[0], key.shape[-2])
            self.seen.add(module)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=given, **kwargs)


def _batched(masks: Sequence[Tensor], batch: int, tokens: int) -> Tensor:
    """bool [B|1, H|1, S, S] from masks [G, N, N], one for all samples or one each; tokens behind N are padding."""
    fitting = [mask for mask in masks if mask.shape[-1] == tokens]
    if len(masks) > 1 and batch == 1 and fitting:
        return fitting[0][None]
    assert len(masks) in (1, batch)
    padded = []
    for mask in masks:
        own = mask.shape[-1]
        whole = torch.zeros(mask.shape[0], tokens, tokens, dtype=torch.bool)
        whole[:, :own, :own] = mask
        whole[:, own:] = True  # what padding sees is of no consequence, but a row of nothing would be NaN
        padded.append(whole)
    return torch.stack(padded)


def _both(given: Tensor | None, window: Tensor, batch: int, keys: int) -> Tensor:
    if given is None:
        return window
    if given.ndim == 2 and given.shape == (batch, keys):
        given = given[:, None, None]
    if given.dtype is torch.bool:
        return given & window
    return torch.where(window, given, -torch.inf)


def masked_output(
    model: nn.Module,
    inputs: Mapping[str, Any],
    layouts: Mapping[str, Layout | Sequence[Layout]],
    method: Method,
    names: Sequence[str] | None = None,
) -> Tensor:
    """The plain model's output when its sites see only what the method's pattern allows on the given layouts.

    Args:
        layouts: by role; one for all samples or one for each.
        names: the sites that see less; all of them by default.
    """
    roles = sites_of(model)
    method = method.resolved(Subject(family_of(model).name, model))
    masks = {}
    for layer, (name, role) in enumerate(roles.items()):
        if names is None or name in names:
            place = Place(role, layer, len(roles), _heads(model.get_submodule(name)), name)
            masks[name] = [_mask(method, one, place) for one in _each(layouts[role])]
    calls = _Masked(masks)
    with _inside(model, list(masks), calls):
        out = output(model, inputs)
    assert calls.seen == set(masks), f"sites without an attention call: {sorted(set(masks) - calls.seen)}"
    return out


def _mask(method: Method, layout: Layout, place: Place) -> Tensor:
    """[G, N, N], a mask for all heads or one for each."""
    at = At(method.kind(place), place.role, layout=layout)
    pattern, heads = method.pattern(layout, at), method.heads(at, place.heads)
    if isinstance(pattern, Dense):
        return torch.ones(1, layout.tokens, layout.tokens, dtype=torch.bool)
    mask = torch.from_numpy(pattern.dense_mask(layout))
    return mask if heads is None else mask[list(heads)]


def _heads(module: nn.Module) -> int:
    return int(getattr(module, "heads", getattr(module, "num_heads", 0)))


def _each(layouts: Layout | Sequence[Layout]) -> Sequence[Layout]:
    return (layouts,) if isinstance(layouts, Layout) else layouts


class _Queries(_Calls):
    def __init__(self) -> None:
        super().__init__()
        self.query: Tensor | None = None

    def attend(self, module: str, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        if query.shape[-2] == key.shape[-2] and self.query is None:
            self.query = query
        return F.scaled_dot_product_attention(query, key, value, **kwargs)


def query_change(model: nn.Module, site: str, inputs: Mapping[str, Any], others: Mapping[str, Any]) -> Tensor:
    """How much the queries of a site's first self-attention call differ between two calls of the model: [B, S]."""
    queries = []
    for arguments in (inputs, {**inputs, **others}):
        calls = _Queries()
        with _inside(model, [site], calls):
            output(model, arguments)
        assert calls.query is not None, f"{site} had no self-attention call"
        queries.append(calls.query)
    return (queries[0] - queries[1]).abs().amax(dim=(1, 3))


def check_whole_window_equals_dense(model: nn.Module, inputs: Mapping[str, Any], methods: Any = WHOLE) -> None:
    """A window over the whole grid gives the dense output at every site."""
    dense, sites = output(model, inputs), len(sites_of(model))
    for method in methods:
        with gensparse.applied(model, method, strict=True) as handle:
            torch.testing.assert_close(output(model, inputs), dense, atol=TOLERANCE, rtol=0)
            check_report(handle.report(), sites)


def check_small_window_equals_masked_dense(
    model: nn.Module, inputs: Mapping[str, Any], layouts: Any, method: Method, differs: float = 1e-3
) -> None:
    """A small window changes the output, to that of the plain model with the dense mask of the given layouts."""
    dense, masked = output(model, inputs), masked_output(model, inputs, layouts, method)
    assert (masked - dense).abs().max() > differs, "the window changes nothing, so nothing is tested"
    with gensparse.applied(model, method, strict=True) as handle:
        torch.testing.assert_close(output(model, inputs), masked, atol=TOLERANCE, rtol=0)
        check_report(handle.report(), len(sites_of(model)))


def check_report(report: Mapping[str, Any], sites: int, calls: int = 1) -> None:
    """Every site ran sparse, in every call."""
    assert (report["sparse"], report["dense"]) == (sites, {})
    assert report["calls"] == {"sparse": sites * calls, "dense": {}}


def check_remove_restores_bits(model: nn.Module, inputs: Mapping[str, Any], method: Method) -> None:
    """After `remove` the output, the processors and all attributes are as before."""
    dense = output(model, inputs)
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    processors = {
        name: (module.processor, type(module.processor))
        for name, module in model.named_modules()
        if getattr(module, "processor", None) is not None
    }
    handle = gensparse.apply(model, method, strict=True)
    assert not torch.equal(output(model, inputs), dense)
    handle.remove()
    assert torch.equal(output(model, inputs), dense)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    for name, (processor, kind) in processors.items():
        assert model.get_submodule(name).processor is processor
        assert type(processor) is kind


def check_positional_call_has_the_same_layout(model: nn.Module, inputs: Mapping[str, Any], method: Method) -> None:
    """The layout does not depend on how arguments are passed."""
    args, rest = positional(model, inputs)
    assert args, "the first argument of the signature is not in the inputs"
    assert layouts_of(model, rest, *args) == layouts_of(model, inputs)
    with gensparse.applied(model, method, strict=True):
        assert torch.equal(output(model, rest, *args), output(model, inputs))
