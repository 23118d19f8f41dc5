"""One asked-for restart, from the request to its new run or to its failure.

Whoever asks waits; the container's own task acts. Until the old run is gone the asker may
withdraw, and nothing has changed. From then on the restart is the task's, and it ends in
one of two ways: a new run, or a container that ended and is freed.
"""

from __future__ import annotations

import trio

from supervisor.errors import Refusal
from supervisor.instances import Instance


class Restart:
    """What the asker and the container's task share. No method waits."""

    def __init__(self) -> None:
        # Around the new run's start alone: cancelling it harms nothing else of the task.
        self.scope = trio.CancelScope()
        # Reserved for the new run; none: the old run is not gone yet.
        self.instance: Instance | None = None
        self.failure: Refusal | None = None
        # Set when the asker need not wait for the old run any longer.
        self.settled = trio.Event()
        # Set when there is a new run, or nothing of the container any more.
        self.done = trio.Event()

    def accept(self, instance: Instance) -> None:
        """The old run is gone: the new one is the container's task's from here."""
        self.instance = instance
        self.settled.set()

    def abandon(self, reason: Refusal) -> None:
        """It must not lead to a run any more. A run that it has led to already stays."""
        if self.done.is_set():
            return
        self.failure = self.failure or reason
        self.scope.cancel()
        self.settled.set()
        if self.instance is None:
            self.done.set()

    def require_wanted(self) -> None:
        """Raises why it was abandoned, if it was."""
        if self.failure is not None:
            raise self.failure

    def finish(self, failure: Refusal | None = None) -> None:
        """The task's last word: the new run runs, or all is freed."""
        self.failure = self.failure or failure
        if self.instance is not None and self.failure is not None:
            self.instance.free()
        self.settled.set()
        self.done.set()
