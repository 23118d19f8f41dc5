"""What the supervisor hands to a plugin when it makes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import structlog

if TYPE_CHECKING:
    from supervisor.events import Event


class PluginContext(msgspec.Struct, frozen=True, kw_only=True):
    """`runtime_dir` is the plugin's own folder (mode 0700, in RAM, made before use).

    `report` tells observers of an event; it never blocks and never raises.
    """

    name: str
    runtime_dir: Path
    log: structlog.stdlib.BoundLogger
    report: Callable[[Event], None]
