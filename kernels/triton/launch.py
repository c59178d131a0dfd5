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

REMEMBERED = 64  # cases of either kind
_smaller: OrderedDict[Case, Config] = OrderedDict()  # the config of the table failed, this one runs
_given_up: OrderedDict[Case, str] = OrderedDict()  # both failed

# A RuntimeError with one of these is a failure of a config; others (a wrong argument, a bug) pass through.
_SIGNS = ("Triton Error", "PassManager::run failed", "out of memory", "ptxas", "LLVM ERROR")


def launch(case: Case, run: Callable[[Config], None]) -> None:
    """`run` with the config of a case; on failure once with a smaller one, which later calls of the case start with.

    Raises:
        BackendError: both failed; kernels that do not compile are not compiled again for the case.
    """
    if case in _given_up:
        raise BackendError(_given_up[case])
    if case in _smaller:
        _last_try(case, _smaller[case], run)
        return
    config = config_for(case)
    small = config.smaller()
    try:
        run(config)
    except Exception as error:
        if not config_failed(error):
            raise
        logger.warning("%s Trying %s.", _sentence(case, config, error), small)
    else:
        return
    _last_try(case, small, run)
    _keep(_smaller, case, small)


def _last_try(case: Case, config: Config, run: Callable[[Config], None]) -> None:
    try:
        run(config)
    except Exception as error:
        if not config_failed(error):
            raise
        sentence = _sentence(case, config, error)
        if not isinstance(error, torch.OutOfMemoryError):  # memory may be free again next time
            _keep(_given_up, case, sentence)
        raise BackendError(sentence) from error


def _keep(cache: OrderedDict, case: Case, value: Config | str) -> None:
    cache[case] = value
    while len(cache) > REMEMBERED:
        cache.popitem(last=False)


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
