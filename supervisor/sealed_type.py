"""Types that only the stage which verified something can make.

Calling such a class raises `TypeError`; the module that owns it uses `_create`. So a
later stage that asks for one as an argument cannot be reached past the earlier one.
"""

from __future__ import annotations

from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


class SealedType(type):
    """Metaclass: no public constructor."""

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(f"{cls.__name__} is made by the stage that verifies it, and by no one else")

    def _create(cls: type[T], *args: Any, **kwargs: Any) -> T:
        return type.__call__(cls, *args, **kwargs)  # type: ignore[no-any-return]  # type's own call is untyped
