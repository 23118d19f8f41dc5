"""One transfer for everybody who waits for the same layer.

A transfer is a task of its own, so that it belongs to none of its callers: the first may
be cancelled, or vanish, and the others still get what it brings. It lives as long as
anybody waits for it; with the last caller it is cancelled, and that caller leaves only
when nothing of it is left. Who asks for a layer whose transfer is being given up waits
for its end and begins anew: it can no longer be saved.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog
import trio

from supervisor.errors import Conflict, Refusal, RuntimeFailed
from supervisor.formats.digest import Digest
from supervisor.seam_guard import CLEANUP_TIMEOUT_S

log = structlog.stdlib.get_logger("supervisor.transfers")


class _Transfer:
    """`outcome` is what its callers raise, None for nothing; read it once `ended` is set."""

    def __init__(self, layer: Digest) -> None:
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.callers = 0
        self.outcome: Refusal | None = Conflict(
            str(layer), "its transfer was given up: the supervisor is shutting down"
        )


class SharedTransfers:
    """All transfers under way. `run` owns their tasks."""

    def __init__(self) -> None:
        self._transfers: dict[Digest, _Transfer] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        """Own the transfers' tasks until cancelled; then all are, and their callers are told."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def is_running(self, layer: Digest) -> bool:
        """Whether a transfer of this layer has not ended yet."""
        return layer in self._transfers

    async def join(self, layer: Digest, work: Callable[[], Awaitable[None]]) -> None:
        """Wait for the layer's transfer; `work` is what it does if there is none yet.

        `work` bounds its own time: whoever joins gets what is left of it. Raises what the
        transfer raised, each caller an exception of its own; anything but a `Refusal` as
        `RuntimeFailed`; `Conflict` when the supervisor shuts down. Cancelling it gives up
        this caller's share: the last one to go ends the transfer, and waits for its end.
        """
        transfer = self._transfers.get(layer)
        while transfer is not None and transfer.scope.cancel_called:
            # Bounded as the transfer is, whose clean-up has a deadline.
            await transfer.ended.wait()
            transfer = self._transfers.get(layer)
        if transfer is None:
            transfer = self._begin(layer, work)
        transfer.callers += 1
        try:
            await transfer.ended.wait()
        finally:
            transfer.callers -= 1
            if transfer.callers == 0 and not transfer.ended.is_set():
                await _give_up(layer, transfer)
        if transfer.outcome is not None:
            raise _twin(transfer.outcome) from transfer.outcome

    def _begin(self, layer: Digest, work: Callable[[], Awaitable[None]]) -> _Transfer:
        if self._nursery is None:
            raise Conflict(str(layer), "the supervisor is shutting down")
        transfer = self._transfers[layer] = _Transfer(layer)
        self._nursery.start_soon(self._run_one, layer, transfer, work)
        return transfer

    async def _run_one(
        self, layer: Digest, transfer: _Transfer, work: Callable[[], Awaitable[None]]
    ) -> None:
        try:
            with transfer.scope:
                await work()
                transfer.outcome = None
        except* Exception as group:  # also beside a Cancelled, which goes on
            transfer.outcome = _refusal(layer, group)
        finally:
            del self._transfers[layer]
            transfer.ended.set()


async def _give_up(layer: Digest, transfer: _Transfer) -> None:
    transfer.scope.cancel()
    with trio.move_on_after(CLEANUP_TIMEOUT_S, shield=True) as limit:
        await transfer.ended.wait()
    if limit.cancelled_caught:
        log.error("a cancelled transfer does not end", layer=str(layer))


def _refusal(layer: Digest, group: ExceptionGroup[Exception]) -> Refusal:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, Refusal):
        return error
    # Its own failure must not end the others, nor the supervisor.
    log.error("a transfer failed inside", layer=str(layer), exc_info=error)
    refusal = RuntimeFailed(str(layer), "its transfer failed inside", actual=repr(error))
    refusal.__cause__ = error
    return refusal


def _twin(refusal: Refusal) -> Refusal:
    """The same refusal as another instance: each raise adds to a traceback of its own.

    Without `__init__`: a plugin's subclass may take other arguments than `Refusal`.
    """
    twin = type(refusal).__new__(type(refusal), *refusal.args)
    twin.__dict__.update(refusal.__dict__)
    return twin
