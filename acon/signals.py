"""Signals by number and by name, as people write and read them."""

from __future__ import annotations

import argparse
import signal


def parse_signal(text: str) -> int:
    """An argparse type: a number, or a name such as TERM; negative: to the process group."""
    sign, name = (-1, text[1:]) if text.startswith("-") else (1, text)
    if name.isdecimal():
        return sign * int(name)
    try:
        return sign * signal.Signals[f"SIG{name.upper().removeprefix('SIG')}"].value
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is no signal") from None


def signal_name(signum: int) -> str:
    """SIGTERM for 15; a number without a name is shown as one."""
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"


def listed_signal(signum: int) -> str:
    """A manifest's entry in words: negative ones go to the process group."""
    if signum == 0:
        return "none at a restart"
    return f"{signal_name(abs(signum))} ({signum}){' to the process group' if signum < 0 else ''}"
