"""Exceptions of gensparse.

Every message is one sentence that says what was given, what is allowed and what to do. The command line maps each class
to an exit code (`gensparse.cli`), so raise the class that fits rather than a bare ValueError.
"""

import difflib
from collections.abc import Iterable


class GensparseError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(GensparseError, ValueError):
    """A setting (window, size, flag, file entry) has a value that is not allowed."""


class LayoutMismatchError(GensparseError):
    """The tokens an attention site received are not those its layout describes."""


class UnsupportedProcessorError(GensparseError):
    """An attention processor never reaches an attention call that can be replaced."""


class BackendError(GensparseError):
    """A backend was asked for explicitly and cannot serve the call."""


class PlanTooLargeError(GensparseError):
    """A plan, or a dense mask, would need more memory than its limit."""


class ParallelError(GensparseError):
    """Processes that share a run disagree about it, or one is missing."""


class ModelError(GensparseError):
    """A model is missing, gated, offline or refused (pickle weights, remote code)."""


class OutputError(GensparseError):
    """A result could not be written."""


class NumericsError(GensparseError):
    """A computation gave NaN, infinity or a constant picture."""


class WontFitError(GensparseError):
    """A request needs more memory than the device has, after every fallback."""


class BusyError(GensparseError):
    """A server has as many jobs as it takes."""


class Cancelled(GensparseError):  # noqa: N818 - a request, not a fault
    """The user asked to stop."""


def short(value: object) -> str:
    """`repr` of a value from outside, cut to a length that fits into a sentence."""
    text = repr(value)
    return text if len(text) <= 60 else text[:56] + "...'"


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """One sentence for a name that does not exist, with the nearest ones."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(names)}"
    return f"unknown {what} {short(name)}; {hint}"
