"""What may be logged of an exception that a stranger's bytes have caused."""

from __future__ import annotations

import traceback

_FRAMES = 6


def fault_without_words(error: BaseException) -> str:
    """Classes and places of an exception and of each in its group.

    Not its sentence, nor that of what caused it: they may quote what was sent.
    """
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(fault_without_words(one) for one in error.exceptions)
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    places = " < ".join(f"{one.filename}:{one.lineno}" for one in reversed(frames))
    return f"{type(error).__name__} at {places or 'no place'}"
