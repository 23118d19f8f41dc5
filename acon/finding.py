"""One thing that `acon doctor` looked for, and what came of it."""

from __future__ import annotations

from typing import Literal

import msgspec


class Finding(msgspec.Struct, frozen=True):
    """`missing` is what containers cannot do without; `absent` what they can.

    `remedy` is for whoever wants it to be otherwise.
    """

    subject: str
    state: Literal["ok", "absent", "missing", "untried"]
    found: str
    remedy: str = ""
