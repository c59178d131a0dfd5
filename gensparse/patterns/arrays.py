"""Arrays that patterns name: looked up in the data of a plan, checked, and flattened to one entry per token."""

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gensparse.errors import ConfigError
from gensparse.layout import Ints, Segment
from gensparse.patterns.base import Bools, Data


def token_mask(what: str, name: str, data: Data, segment: Segment) -> Bools:
    """The mask `name` as bool [tokens of the segment]; 0 and 1 of any dtype count."""
    return as_mask(what, name, token_array(what, name, lookup(what, name, data), segment))


def token_numbers(what: str, name: str, data: Data, segment: Segment) -> Ints:
    """The array `name` as integers >= 0 [tokens of the segment]."""
    array = token_array(what, name, lookup(what, name, data), segment)
    if not (np.issubdtype(array.dtype, np.integer) and (array >= 0).all()):
        raise ConfigError(
            f"{what}: array {name!r} of dtype {array.dtype} holds something else than integers of at least 0; pass the "
            "number of its group for every token, 0 for none."
        )
    return array.astype(np.int64)


def as_mask(what: str, name: str, array: NDArray[Any]) -> Bools:
    """The array as bool, or ConfigError unless it holds only 0 and 1."""
    if array.dtype == np.bool_:
        return array
    if not (np.issubdtype(array.dtype, np.number) and ((array == 0) | (array == 1)).all()):
        raise ConfigError(
            f"{what}: mask {name!r} of dtype {array.dtype} holds something else than 0 and 1; threshold it first."
        )
    return array != 0


def token_array(what: str, name: str, array: NDArray[Any], segment: Segment) -> NDArray[Any]:
    """One entry per token, flat, from an array [tokens], [F, H, W], or that without leading axes of one."""
    shapes = [segment.shape[first:] for first in range(3) if prod(segment.shape[:first]) == 1]
    if array.shape not in [(segment.length,), *shapes]:
        raise ConfigError(
            f"{what}: array {name!r} has shape {array.shape} but its segment has {segment.length} tokens on grid "
            f"{segment.shape}; resize it to {shapes[-1]}."
        )
    return array.reshape(-1)


def lookup(what: str, name: str, data: Data) -> NDArray[Any]:
    """The array `name` of the data, or ConfigError naming those that are there."""
    if name not in data:
        there = f"it has {', '.join(sorted(data))}" if data else "there is none"
        raise ConfigError(f"{what} needs the array {name!r} in data, but {there}; pass data={{{name!r}: array}}.")
    return np.asarray(data[name])
