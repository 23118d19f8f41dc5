"""One container as the supervisor sees it, from its measured start to after its end."""

from __future__ import annotations

import msgspec
import trio

from supervisor.admission import AdmittedImage
from supervisor.operations import ContainerView
from supervisor.proofs import StartReceipt, VerifiedLayer
from supervisor.seams import ExitStatus, IdMap, RunningContainer


class MeasuredStart(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was decided about a start, and the receipt that it is in the log."""

    image: AdmittedImage
    layers: tuple[VerifiedLayer, ...]
    receipt: StartReceipt


class Container:
    """One container as the supervisor sees it, also after its end."""

    def __init__(self, container_id: int, start: MeasuredStart, id_map: IdMap) -> None:
        self.container_id = container_id
        self.start = start
        self.id_map = id_map
        self.running: RunningContainer | None = None
        self.exit: ExitStatus | None = None
        # Set once the status shows it; its program may run a moment earlier.
        self.listed = trio.Event()
        self.ended = trio.Event()

    @property
    def image_id(self) -> str:
        return self.start.image.image_id

    @property
    def state(self) -> str:
        if self.exit is not None:
            return "exited"
        return "starting" if self.running is None else "running"

    def view(self) -> ContainerView:
        """What clients and the status document are shown."""
        running = self.running if self.state == "running" else None
        return ContainerView(
            container_id=self.container_id,
            image_id=self.image_id,
            state=self.state,
            pid=None if running is None else running.pid,
            exit_code=None if self.exit is None else self.exit.exit_code,
            signal=None if self.exit is None else self.exit.signal,
            argv=self.start.receipt.event.argv,
            start_event_digest_sha384=self.start.receipt.digest_sha384,
        )
