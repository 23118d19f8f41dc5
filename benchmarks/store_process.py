"""A fresh process that holds an image store, for measuring its memory: `python -m ...`.

Standard input: first line a `Task` as JSON, then a line to begin, then its end to stop.
Standard output: a line "ready" with the store open, then a `Result` as JSON with the layer
mounted.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import msgspec
import structlog
import trio

from benchmarks.layer_inputs import Layer
from benchmarks.store_side import from_files, open_store


class Task(msgspec.Struct, frozen=True, kw_only=True):
    runtime_dir: str
    layer: Layer


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What the layer takes while it is mounted: tar and index, or the tree."""

    mounted_bytes: int


def main() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    task = msgspec.json.decode(sys.stdin.readline(), type=Task)
    trio.run(_hold, task)


async def _hold(task: Task) -> None:
    root = Path(task.layer.blob).parent
    async with open_store(Path(task.runtime_dir), file_roots=[root]) as opened:
        await _say("ready")
        await trio.to_thread.run_sync(sys.stdin.readline)
        (wanted,) = from_files([task.layer])
        layer = await opened.load(wanted)
        mounted = await opened.mount([layer])
        result = Result(mounted_bytes=opened.mounted_bytes(layer))
        await _say(msgspec.json.encode(result).decode())
        await trio.to_thread.run_sync(sys.stdin.read)
        await mounted.close()


async def _say(line: str) -> None:
    await trio.to_thread.run_sync(lambda: print(line, flush=True))


if __name__ == "__main__":
    main()
