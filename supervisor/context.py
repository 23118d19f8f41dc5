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
    """`runtime_dir` is the plugin's own folder, in RAM and made before use. Its mode is 0711:
    others may pass through (a container's root lies below one) but not list it.

    `report` tells observers of an event; it never blocks and never raises.
    """

    name: str
    runtime_dir: Path
    log: structlog.stdlib.BoundLogger
    report: Callable[[Event], None]
