"""Tries an idmapped mount of a tmpfs. Run in a mount namespace of its own, by `acon doctor`.

unshare --mount python -m acon.idmap_trial EMPTY_FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import trio

from plugins.image_store.kernel import idmapped_clone, mount
from plugins.image_store.user_namespace import user_namespace

_SHOWN_AS = 100_000


async def _try(folder: Path) -> int:
    """The owner that a file of uid 0 has through the mapped mount."""
    mount(b"none", os.fsencode(folder), filesystem=b"tmpfs", flags=0)
    for name in ("layer", "mapped"):
        (folder / name).mkdir()
    (folder / "layer" / "file").touch()
    async with user_namespace([(0, _SHOWN_AS)], item="trial") as namespace_fd:
        idmapped_clone(os.fsencode(folder / "layer"), os.fsencode(folder / "mapped"), namespace_fd)
    return (folder / "mapped" / "file").stat().st_uid


def main() -> int:
    owner = trio.run(_try, Path(sys.argv[1]))
    if owner != _SHOWN_AS:
        sys.stderr.write(f"a file of uid 0 is shown as {owner}, not {_SHOWN_AS}\n")
        return 1
    sys.stdout.write("a tmpfs was mounted with other owners\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
