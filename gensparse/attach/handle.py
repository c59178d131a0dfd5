"""What `apply` gives back: the report of what ran, and the way back."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from gensparse.attach.attachment import Attachment
from gensparse.errors import ConfigError
from gensparse.methods import Method
from gensparse.processors.tally import merged


class Handle:
    """What `apply` changed on one pipeline or model: counts, and the way back."""

    def __init__(self, attachments: Sequence[Attachment]) -> None:
        self._attachments = tuple(attachments)

    @property
    def active(self) -> bool:
        """Whether the changes are in place: not removed, not replaced by another `apply`."""
        return all(attachment.active for attachment in self._attachments)

    @property
    def method(self) -> Method:
        """What acts on the model, with its settings; of several denoisers the first one's."""
        return self._attachments[0].method

    def report(self) -> dict[str, Any]:
        """What the attention sites did.

        Returns:
            "sparse": number of sites, by their last call (before the first: as set up); "dense": {reason: sites};
            "calls": the same two, counted by call; "backend": those of the last sparse calls; "density": share of
            the query-key pairs that is computed, mean over the sites of what each did in its last sparse call.
            Both are None before a sparse call. "method": its settings as data; "family": of the model. "error":
            {"measured": relative error of the attention outputs against dense ones, root mean square over the tokens
            that `audit` looked at; "predicted": what the method expected}, each None where it is not known. "recorded",
            after `record`: {source: tokens, grid and bytes of what the sites keep}. Methods may add entries of their
            own.
        """
        attached = self._attachments
        densities = [density for attachment in attached for density in attachment.tally.densities()]
        return {
            **merged(attachment.tally.report() for attachment in attached),
            "backend": _listed(backend for attachment in attached for backend in attachment.backends),
            "density": sum(densities) / len(densities) if densities else None,
            "method": attached[0].method.to_dict(),
            "family": _listed(attachment.family.name for attachment in attached),
            "error": _error_of(attached),
            **_recorded_by(attached),
            **{name: value for one in attached if one.loaded for name, value in one.loaded.report().items()},
        }

    def restart(self, steps: int | None = None) -> None:
        """The next denoiser call of this thread starts a new run; pipelines of several stages call it before each.

        Args:
            steps: of the new run; needed only where no pipeline tells it.
        """
        for attachment in self._attachments:
            attachment.clock.restart(steps)

    def record(self, *, keep_on: torch.device | str | None = None, **call: Any) -> None:
        """Run the denoiser once so that its sites keep keys and values, which later calls see beside their own.

        For methods with `records = True`, such as ScaleDiT, whose low-resolution picture is recorded before the
        high-resolution steps. What was recorded before is forgotten.

        Args:
            call: arguments of the denoiser's forward; `recorded` of the method says which.
            keep_on: device to keep them on, such as "cpu", from where they are copied at every use; None keeps them
                where they are computed.

        Raises:
            ConfigError: the method records nothing, is not on the model any more, or needs other arguments.
            LayoutMismatchError: the call does not say what its tokens are.
        """
        for attachment in self._attachments:
            attachment.record(call, keep_on)

    def use(self, subjects: Any) -> None:
        """Who is in the pictures to come: a `gensparse.Subjects`, for methods for several subjects.

        May be called between runs and between steps.

        Raises:
            ConfigError: the method has no use for subjects, or not for these.
        """
        for attachment in self._attachments:
            attachment.taking_subjects().use(subjects)

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Around a first run that a method learns from (consistory notes what shows the same in its pictures).

        Raises:
            ConfigError: the method has no rehearsal.
        """
        with ExitStack() as stack:
            for attachment in self._attachments:
                stack.enter_context(attachment.taking_subjects().rehearsal())
            yield

    @contextmanager
    def writing(self, *names: str, keep_on: torch.device | str | None = None) -> Iterator[None]:
        """Inside, the reference pictures of every call are kept in a bank, by step and layer, for later runs.

        Afterwards references come from the bank, and batches hold generated pictures alone, until `forget`.

        Args:
            names: of the references in the order of the batch; by default those of `use`, else numbers.
            keep_on: device to keep them on, such as "cpu", from where they are copied at every use.

        Raises:
            ConfigError: the method has no references.
        """
        with ExitStack() as stack:
            for attachment in self._attachments:
                stack.enter_context(attachment.taking_subjects().writing(names, keep_on))
            yield

    def forget(self) -> None:
        """Drop what was recorded, and what a bank holds of references."""
        for attachment in self._attachments:
            attachment.forget()

    def start(self, pipe: Any, latents: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """The latents that a run is to begin with, for methods that move latents between steps.

        Set the timesteps of the scheduler first, and pass the result to the pipeline as `latents`.

        Args:
            latents: noise [B, C, h, w] as the pipeline takes it.
            arguments: further ones of the denoiser's conditional call, such as `encoder_hidden_states`.
        """
        for attachment in self._attachments:
            if attachment.active and attachment.loaded is not None:
                latents = attachment.loaded.start(pipe, latents, dict(arguments))
        return latents

    def maps(self) -> torch.Tensor:
        """Attention maps [layers, B, heads, tokens, L] of the last call, with their gradients, and forget them.

        Raises:
            ConfigError: the method keeps none, or was removed.
        """
        loaded = self._attachments[0].loaded
        if loaded is None or not self._attachments[0].active:
            raise ConfigError("No method that keeps attention maps is on the model; apply disendiff for that.")
        return loaded.maps()

    def on_step_end(self, pipe: Any, index: int, timestep: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """For `callback_on_step_end` of a pipeline, with methods that change its latents between steps.

        Args:
            arguments: the pipeline's tensors by name, "latents" among them.

        Returns:
            Those that are to go on.
        """
        changed = dict(arguments)
        for attachment in self._attachments:
            if attachment.active and attachment.loaded is not None:
                changed |= attachment.loaded.step_end(pipe, index, timestep, changed)
        return changed

    def remove(self) -> None:
        """Undo everything, bit for bit; does nothing where it is undone or replaced already.

        Raises:
            ConfigError: weights of the method cannot be taken off where the model's are now; the method stays then.
        """
        for attachment in self._attachments:
            attachment.remove()
            attachment.forget()


def _error_of(attached: Sequence[Attachment]) -> dict[str, float | None]:
    """Relative error of the attention outputs: as measured by audits, and as the method predicted it."""
    sums = [site.audited for attachment in attached for site in attachment.counted if site.audited is not None]
    lost, norm = torch.stack([x.double().cpu() for x in sums]).sum(0).tolist() if sums else (0.0, 0.0)
    predicted = [value for attachment in attached for value in attachment.predicted_errors()]
    return {
        "measured": math.sqrt(lost / norm) if norm else None,
        "predicted": max(predicted) if predicted else None,
    }


def _recorded_by(attached: Sequence[Attachment]) -> dict[str, Any]:
    found = {name: facts for attachment in attached for name, facts in attachment.bank.facts().items()}
    return {"recorded": found} if found else {}


def _listed(names: Iterable[str]) -> str | None:
    """Different names in one text, None for no name."""
    return ", ".join(sorted(set(names))) or None
