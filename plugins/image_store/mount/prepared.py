"""A layer that containers can be shown, however that was done."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from plugins.image_store.mount.supplement import Hints

How = Literal["erofs", "unpack"]


class PreparedLayer(msgspec.Struct, frozen=True, kw_only=True):
    """A layer's tree at `directory`: an EROFS mount over its tar, or unpacked on tmpfs.

    `memory_bytes` is what that takes, tar and index or the tree; `copy_bytes` what a copy of
    the tree with other owners may take.
    """

    directory: Path
    how: How
    hints: Hints
    memory_bytes: int
    copy_bytes: int
