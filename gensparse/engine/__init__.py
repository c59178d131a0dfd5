"""One request to one result: the only place that picks device, dtype and offload and that handles out of memory.

`Session` keeps a loaded pipeline between requests, `execute` runs one request from start to end, and `plan` stops
before any weight is read. The command line and the app are thin wrappers around these three.
"""

from gensparse.engine.record import reproduction_warnings
from gensparse.engine.resolve import estimate_for, open_model, plan, resolve_request
from gensparse.engine.session import Runner, Session, execute
from gensparse.engine.values import Event, Output, OutputOptions, Resolved, Result

__all__ = [
    "Event",
    "Output",
    "OutputOptions",
    "Resolved",
    "Result",
    "Runner",
    "Session",
    "estimate_for",
    "execute",
    "open_model",
    "plan",
    "reproduction_warnings",
    "resolve_request",
]
