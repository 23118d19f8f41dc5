"""Ended containers whose files wait for a restart: for a while, and not too many."""

from __future__ import annotations

from supervisor.container import Container


class KeptContainers:
    """In the order in which they ended. One too many costs the oldest its files.

    What is kept is memory (writable roots, `/tmp`, `/run`), so strangers who start and end
    containers must not be able to heap it up.
    """

    def __init__(self, *, keep_s: float, max_kept: int) -> None:
        self.keep_s = keep_s
        self._max_kept = max_kept
        self._kept: dict[int, Container] = {}
        self._closed = False

    def add(self, container: Container) -> None:
        """Keep one that just ended, unless its manifest or the configuration says not to."""
        if self._closed or not self.keep_s or not self._max_kept or container.manifest.no_restart:
            container.give_up_files()
            return
        self._kept[container.container_id] = container
        while len(self._kept) > self._max_kept:
            self.give_up(next(iter(self._kept.values())))

    def remove(self, container: Container) -> None:
        """It is restarted, or freed already. Idempotent."""
        self._kept.pop(container.container_id, None)

    def give_up(self, container: Container) -> None:
        """It can be restarted no more; its task frees it. Idempotent."""
        self.remove(container)
        container.give_up_files()

    def close(self) -> None:
        """Give all up and keep none from here on: the supervisor stops."""
        self._closed = True
        for container in tuple(self._kept.values()):
            self.give_up(container)
