"""One container as the supervisor sees it, from its measured start to after its end."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import trio

from supervisor.container_log import ContainerLog
from supervisor.container_seams import ExitStatus, RunningContainer
from supervisor.formats.manifest import Manifest
from supervisor.formats.status import AttestationData, ContainerStatus
from supervisor.operations import ContainerView
from supervisor.restart import Restart
from supervisor.seams import IdMap
from supervisor.starting import MeasuredStart

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Container:
    """What is known of one container, over all of its runs and after them.

    Its own task (`container_life`) tells it what happens, with methods that do not wait: what
    is shown is never half of a change.
    """

    def __init__(
        self, container_id: int, start: MeasuredStart, id_map: IdMap, log: ContainerLog
    ) -> None:
        self.container_id = container_id
        self.start = start
        self.id_map = id_map
        self.log = log
        self.attestation_data: AttestationData | None = None
        self.restarts = 0
        # None unless a run is under way.
        self.running: RunningContainer | None = None
        self.exit: ExitStatus | None = None
        # By trio's clock: unlike the TD's, it goes one way.
        self.ended_at = 0.0
        self.restart: Restart | None = None
        # Whether its root and scratch are there, for the run or for one to come.
        self.has_files = False
        # Set when its task has something else to do than keeping its files.
        self.wanted = trio.Event()
        # Set once the status shows the present run; its program may run a moment earlier.
        self.listed = trio.Event()
        # Set when nothing is left of it but what is known here.
        self.freed = trio.Event()
        self._is_starting = True
        self._since_ns = self._ended_ns = time.time_ns()

    # --- what its task tells ------------------------------------------------------------------

    def starts_again(self) -> None:
        """A new run begins; the old one's socket is closed, and with it all who spoke for it."""
        self._is_starting = True
        self._since_ns = time.time_ns()
        self.attestation_data = None
        self.listed = trio.Event()
        self.log.begin_run()

    def runs(self, running: RunningContainer) -> None:
        """The start succeeded: a program runs."""
        if self.exit is not None:
            self.restarts += 1
        self.running = running
        self.exit = None
        self.has_files = True
        self._is_starting = False
        self._since_ns = time.time_ns()
        self.listed.set()

    def ends(self, status: ExitStatus) -> None:
        """The first process ended, and with it every other of the run."""
        self.running = None
        self.exit = status
        self.attestation_data = None
        self.ended_at = trio.current_time()
        self.wanted = trio.Event()
        self._since_ns = self._ended_ns = time.time_ns()

    def give_up_files(self) -> None:
        """It can be restarted no more, and need not be kept."""
        self.has_files = False
        self.wanted.set()

    def is_freed(self) -> None:
        """Its task is over. A start that failed is forgotten: it ended when its last run did."""
        if self._is_starting and self.exit is not None:
            self._is_starting = False
            self._since_ns = self._ended_ns
        self.has_files = False
        self.attestation_data = None
        self.freed.set()

    # --- what is asked of it ------------------------------------------------------------------

    def ask(self, restart: Restart) -> None:
        """Let its task restart it: at once if it has ended, else when it does."""
        self.restart = restart
        self.wanted.set()

    # --- what is shown of it ------------------------------------------------------------------

    @property
    def item(self) -> str:
        """What refusals call it."""
        return f"container {self.container_id}"

    @property
    def image_id(self) -> str:
        return self.start.image.image_id

    @property
    def manifest(self) -> Manifest:
        return self.start.image.signed.manifest

    @property
    def state(self) -> str:
        if self.running is not None:
            return "running"
        return "starting" if self._is_starting else "exited"

    def view(self) -> ContainerView:
        """What clients are shown."""
        end = self._shown_end()
        return ContainerView(
            container_id=self.container_id,
            image_id=self.image_id,
            state=self.state,
            since=_rfc3339(self._since_ns),
            restarts=self.restarts,
            restartable=self.has_files and not self.manifest.no_restart,
            pid=None if self.running is None else self.running.pid,
            exit_code=end.exit_code,
            signal=end.signal,
            out_of_memory=end.out_of_memory,
            argv=self.start.receipt.event.argv,
            environment=self.start.receipt.event.environment,
            signals=self.manifest.signals,
            log_fds=self.manifest.log_fds,
            layers=self.start.receipt.event.layers,
            start_event_digest_sha384=self.start.receipt.digest_sha384,
        )

    def status(self) -> ContainerStatus:
        """Its part of the status document."""
        end = self._shown_end()
        return ContainerStatus(
            container_id=self.container_id,
            image_id=self.image_id,
            state=self.state,
            exit_code=end.exit_code,
            signal=end.signal,
            restarts=self.restarts,
            attestation_data=None if self.state == "exited" else self.attestation_data,
            start_event_digest_sha384=self.start.receipt.digest_sha384,
        )

    def _shown_end(self) -> ExitStatus:
        is_over = self.exit is not None and self.state == "exited"
        return self.exit if is_over and self.exit is not None else ExitStatus()


def _rfc3339(time_ns: int) -> str:
    """In UTC, to the millisecond."""
    moment = _EPOCH + timedelta(microseconds=time_ns // 1000)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
