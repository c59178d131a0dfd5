"""References that keep nothing alive and are not copied with what holds them."""

import weakref
from typing import Any


class Weak:
    """A function that gives an object, or None once it is gone.

    A copy gives the copy of the object where both are copied together, else None; so does what is read from a file.
    """

    def __init__(self, to: Any) -> None:
        self._to = None if to is None else weakref.ref(to)

    def __call__(self) -> Any:
        return self._to and self._to()

    def __reduce__(self) -> "tuple[type[Weak], tuple[None]]":
        return Weak, (None,)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Weak":
        return Weak(memo.get(id(self())))
