"""Launching: a kernel that does not compile or does not fit is tried once more with a smaller config."""

import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import triton
from torch import Tensor

from gensparse.errors import BackendError

from .tune import Case, Config, config_for

logger = logging.getLogger("gensparse")

REMEMBERED = 64  # cases whose smaller config is kept
_smaller: OrderedDict[Case, Config] = OrderedDict()

# A RuntimeError with one of these is a failure of a config; others (a wrong argument, a bug) pass through.
_SIGNS = ("Triton Error", "PassManager::run failed", "out of memory", "ptxas", "LLVM ERROR")


def launch(case: Case, run: Callable[[Config], None]) -> None:
    """`run` with the config of a case; on failure once with a smaller one, which later calls of the case start with.

    Raises:
        BackendError: both failed.
    """
    config = _smaller.get(case) or config_for(case)
    try:
        run(config)
        return
    except Exception as error:
        small = config.smaller()
        if not config_failed(error):
            raise
        if small == config or case in _smaller:
            raise BackendError(_sentence(case, config, error)) from error
        logger.warning("%s Trying %s.", _sentence(case, config, error), small)
    try:
        run(small)
    except Exception as error:
        if not config_failed(error):
            raise
        raise BackendError(_sentence(case, small, error)) from error
    _smaller[case] = small
    while len(_smaller) > REMEMBERED:
        _smaller.popitem(last=False)


def config_failed(error: Exception) -> bool:
    """Whether an error means that a kernel did not compile, fit or start."""
    kinds = (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError, torch.OutOfMemoryError)
    if isinstance(error, kinds) or type(error).__name__ == "PTXASError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def on_device(x: Tensor) -> AbstractContextManager[None]:
    """Launches inside go to the device of `x`."""
    return torch.cuda.device_of(x)


def _sentence(case: Case, config: Config, error: Exception) -> str:
    reason = str(error).strip().splitlines()
    return (
        f"Can't run triton; the {case.kernel} kernel failed on {case.arch} with {config}: "
        f"{type(error).__name__}{': ' + reason[0] if reason else ''}."
    )
