"""Processors whose attention call is the wrong place to cut, written anew.

A module here has a function `call` with the signature of the `__call__` it stands for. It sends its attention through
the global name `dispatch_attention_fn`, which a sparse variant redirects as in diffusers' own processors.
"""

import types
from importlib import import_module

NATIVE = {"HunyuanVideo15AttnProcessor2_0": "gensparse.processors.native.hunyuan_video15"}
"""Class name of a processor -> module that stands for it."""


def native_call(cls: type) -> types.FunctionType | None:
    """The function that stands for the `__call__` of a processor class, or None where its own is right."""
    module = NATIVE.get(cls.__name__)
    return None if module is None else import_module(module).call
