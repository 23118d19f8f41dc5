"""Finds out how layers can be shown here. Run in a mount namespace of its own, by `acon doctor`.

unshare --mount python -m acon.layer_trial EMPTY_FOLDER

Prints the best way that works; on standard error why better ones do not.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import structlog
import trio

from plugins.image_store.arrival.storage import RAM
from plugins.image_store.config import StoreConfig
from plugins.image_store.mount.kernel import MS_NODEV, MS_NOSUID, mount
from plugins.image_store.trial import try_way, ways_of
from supervisor import Refusal


async def _try(folder: Path) -> str | None:
    log = structlog.stdlib.get_logger("trial")
    for way in ways_of(StoreConfig()):
        try:
            await try_way(way, folder / "trial", storage=RAM, log=log)
        except Refusal as error:
            sys.stderr.write(f"{way}: {error}\n")
        else:
            return str(way)
    return None


def main() -> int:
    folder = Path(sys.argv[1])
    mount(b"none", os.fsencode(folder), filesystem=b"tmpfs", flags=MS_NODEV | MS_NOSUID)
    works = trio.run(_try, folder)
    if works is None:
        return 1
    sys.stdout.write(f"works: {works}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
