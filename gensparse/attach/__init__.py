"""Make a diffusers pipeline sparse and undo it: `apply`, `remove`, `applied`, `make_processors`."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from gensparse.attach.attachment import Attachment, attachment_of, detach, put_back
from gensparse.attach.denoisers import denoiser, denoisers, repeated_blocks
from gensparse.attach.handle import Handle
from gensparse.attach.settings import Settings
from gensparse.families import attention_modules
from gensparse.methods import Method, as_method
from gensparse.processors import _compat
from gensparse.processors.clock import Clock

__all__ = ["Handle", "applied", "apply", "attached", "compile_blocks", "make_processors", "remove"]


def apply(
    pipe_or_model: Any,
    method: Method | str | Mapping[str, Any],
    *,
    strict: bool = False,
    dense_steps: int = 0,
    dense_last_steps: int = 0,
    dense_layers: Iterable[int] = (),
    audit: int | None = None,
    subjects: Any = None,
) -> Handle:
    """Make the attention of a pipeline (or of one denoiser) sparse, in place.

    A method that is already on the model is replaced, so applying twice equals applying once. Apply before compiling.

    Args:
        method: `Clear(radius=16)`, "clear", "clear:radius=16", or the dict of `Method.to_dict`.
        strict: raise where a call does not fit its layout, instead of running it dense and reporting why.
        dense_steps: number of first denoising steps that stay dense.
        dense_last_steps: number of last steps that stay dense. A bare model does not know how many there are: apply to
            the pipeline, or say it by `handle.restart(steps=...)`.
        dense_layers: indices of attention layers, in model order, that stay dense; negative ones count from the end.
        audit: picture tokens per attention call whose output is compared with dense attention, exactly and at little
            cost; `report()["error"]` tells the difference. By default as many as the method wants (none, but for auto).
        subjects: of the pictures, a `gensparse.Subjects`, for methods for several subjects; see `Handle.use`.

    Raises:
        ConfigError: an unknown method or setting, or a model of no supported family.
        UnsupportedProcessorError: a processor cannot be made sparse; the model is unchanged then.
    """
    settings = Settings(as_method(method), strict, dense_steps, dense_last_steps, dense_layers, audit)
    _compat.warn_of_other_versions()
    models, clock = denoisers(pipe_or_model), Clock()  # denoisers that take turns count the steps of one run
    attachments = [Attachment(model, settings, pipe_or_model, clock, len(models)) for model in models]
    for attachment in attachments:
        attachment.check()
    before = [attachment_of(model) for model in models]
    try:
        for attachment in attachments:
            attachment.install()
        if subjects is not None:
            for attachment in attachments:
                attachment.taking_subjects().use(subjects)
    except BaseException:
        put_back(models, before)  # of denoisers that take turns never only some are sparse
        raise
    return Handle(attachments)


def remove(pipe_or_model: Any) -> None:
    """Undo whatever `apply` or `make_processors` changed on a pipeline or model; does nothing where nothing is."""
    for model in denoisers(pipe_or_model):
        detach(model)


@contextmanager
def applied(pipe_or_model: Any, method: Method | str | Mapping[str, Any], **settings: Any) -> Iterator[Handle]:
    """`apply` inside a with block; afterwards the model is as before it, with the method it had or none."""
    models = denoisers(pipe_or_model)
    before = [attachment_of(model) for model in models]
    handle = apply(pipe_or_model, method, **settings)
    try:
        yield handle
    finally:
        put_back(models, before)


def attached(pipe_or_model: Any) -> Handle | None:
    """The handle of what is on all denoisers of a pipeline or on a model, None where `apply` put nothing there."""
    found = [attachment for model in denoisers(pipe_or_model) if (attachment := attachment_of(model)) is not None]
    return Handle(found) if found and len(found) == len(denoisers(pipe_or_model)) else None


def make_processors(model: nn.Module, method: Method | str | Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    """Sparse copies of a model's attention processors, for `model.set_attn_processor(...)`.

    The model is prepared for them (see `apply`, which takes the same settings); `remove(model)` undoes that and turns
    processors that were set dense again. Sites whose processor is not set stay dense and are reported.

    Returns:
        {"name.of.module.processor": processor} with every processor of the model, those of no site unchanged.
    """
    attachment = Attachment(denoiser(model), Settings(as_method(method), **settings), None)
    attachment.check()
    attachment.install(swap=False)
    return {
        f"{name}.processor": attachment.sparse_copy(name, module) for name, module in attention_modules(model).items()
    }


def compile_blocks(pipe_or_model: Any, **options: Any) -> int:
    """Compile the repeated blocks of the denoisers, each class of blocks once instead of the whole model.

    Like `model.compile_repeated_blocks`, and also for models that diffusers names no blocks for. A model may be made
    sparse before or after it.

    Args:
        options: of `torch.compile`; docs/processors.md says which methods allow `fullgraph=True`.

    Returns:
        The number of blocks.

    Raises:
        ConfigError: a model of no supported family, or without repeated blocks.
    """
    blocks = [block for model in denoisers(pipe_or_model) for block in repeated_blocks(model)]
    for block in blocks:
        block.compile(**options)
    return len(blocks)
