"""A supervisor that only remembers, served for real over sockets, and a raw HTTP client."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import h11
import msgspec
import structlog
import trio

from plugins.http_api import HttpApi
from plugins.http_api.settings import Settings
from supervisor import (
    AconReport,
    AdmissionResult,
    Conflict,
    ContainerView,
    DigestMismatch,
    Event,
    ExitStatus,
    ImageView,
    Invocation,
    InvocationResult,
    LayerSource,
    LayerUpload,
    LogPage,
    ManifestUpload,
    PluginContext,
    Refusal,
    StoredLayer,
    UnknownItem,
    Untrusted,
)
from supervisor.container_log import ContainerLog
from supervisor.formats.digest import Digest, digest_of
from supervisor.formats.status import (
    AttestationData,
    ContainerStatus,
    ImageStatus,
    Status,
    encode_status,
)

IMAGE_ID = f"sha384/{'a' * 96}/{'b' * 96}"
START_DIGEST = "c" * 96
LIMIT_BYTES = 4 << 20
LOG_BYTES = 16 << 10


class FakeUpload:
    """Bytes in memory; `changed` wakes whoever waits for progress."""

    def __init__(self, expected: Digest) -> None:
        self.expected = expected
        self.data = bytearray()
        self.aborted = False
        self.changed = trio.Event()

    @property
    def received_bytes(self) -> int:
        return len(self.data)

    async def write(self, chunk: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if len(self.data) + len(chunk) > LIMIT_BYTES:
            raise Untrusted("layer", "is bounded", expected=LIMIT_BYTES)
        self.data += chunk
        self._tell()

    async def finish(self) -> StoredLayer:
        await trio.lowlevel.checkpoint()
        return StoredLayer(
            expected=self.expected,
            computed={"sha384": hashlib.sha384(self.data).hexdigest()},
            size_bytes=len(self.data),
            source="upload",
        )

    async def abort(self) -> None:
        await trio.lowlevel.checkpoint()
        self.data.clear()
        self.aborted = True
        self._tell()

    def _tell(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    async def wait_for(self, received_bytes: int) -> None:
        while self.received_bytes < received_bytes:
            await self.changed.wait()


class FakeOperations:
    """`refusal`, when set, is raised by the next call that can be refused."""

    def __init__(self) -> None:
        self.groups: list[tuple[ManifestUpload, ...]] = []
        self.uploads: list[FakeUpload] = []
        self._upload_began = trio.Event()
        self.finish_hold: trio.Event | None = None  # while set, `finish_layer` waits for it
        self.layers: dict[Digest, bytes] = {}
        self.fetched: list[LayerSource] = []
        self.fetching = 0
        self.given_up = 0
        self.fetch_hold: trio.Event | None = None  # while set, `fetch_layer` waits for it
        self.changed = trio.Event()  # wakes `wait_for_fetches`
        self.tell: Callable[[Event], Awaitable[None]] | None = None  # the served plugin's observer
        self.starts: list[tuple[str, tuple[str, ...]]] = []
        self.signals: list[tuple[int, int]] = []
        self.restarts: list[tuple[int, float]] = []
        self.invocations: list[tuple[int, Invocation]] = []
        self.invoking = 0
        self.invoke_hold: trio.Event | None = None  # while set, `invoke` waits for it
        self.result = InvocationResult(
            status=ExitStatus(exit_code=3),
            stdout=b"out\xff",
            stderr=b"",
            stdout_cut=True,
            stderr_cut=False,
        )
        self.logs = {number: ContainerLog(kept_bytes=LOG_BYTES) for number in (1, 2)}
        self.memory_asked = 0
        self.nonces: list[bytes] = []
        self.sealed = False
        self.refusal: Exception | None = None
        self.hold: trio.Event | None = None  # while set, `seal` waits for it
        self.running = 0
        self.most_running = 0

    def _check(self) -> None:
        if self.refusal is not None:
            raise self.refusal

    async def admit(self, group: Sequence[ManifestUpload]) -> AdmissionResult:
        self._check()
        self.groups.append(tuple(group))
        ids = tuple(
            f"sha384/{'a' * 96}/{digest_of('sha384', image.manifest).hex}" for image in group
        )
        return AdmissionResult(image_ids=ids, missing_layers=("x",), already_admitted=())

    async def upload_layer(self, expected: Digest, *, size_bytes: int | None) -> LayerUpload:
        self._check()
        await trio.lowlevel.checkpoint()
        upload = FakeUpload(expected)
        self.uploads.append(upload)
        self._upload_began.set()
        self._upload_began = trio.Event()
        return upload

    async def wait_for_upload(self, index: int, received_bytes: int) -> None:
        """Until the upload with this index has that many bytes."""
        with trio.fail_after(5):
            while len(self.uploads) <= index:
                await self._upload_began.wait()
            await self.uploads[index].wait_for(received_bytes)

    async def finish_layer(self, expected: Digest, upload: LayerUpload) -> None:
        stored = await upload.finish()
        assert isinstance(upload, FakeUpload)
        data = bytes(upload.data)
        if stored.computed[expected.algorithm] != expected.hex:
            await upload.abort()
            raise DigestMismatch(str(expected), "must match", actual=stored.computed)
        if expected in self.layers:
            raise Conflict(str(expected), "was delivered twice")
        if self.finish_hold is not None:
            await self.finish_hold.wait()
        self.layers[expected] = data

    async def fetch_layer(self, expected: Digest, source: LayerSource) -> None:
        self._check()
        self.fetched.append(source)
        self._count_fetches(1)
        try:
            if self.fetch_hold is not None:
                await self.fetch_hold.wait()
            self.layers[expected] = b""
        except trio.Cancelled:
            self.given_up += 1
            raise
        finally:
            self._count_fetches(-1)

    def _count_fetches(self, more: int) -> None:
        self.fetching += more
        self.changed.set()
        self.changed = trio.Event()

    async def wait_for_fetches(self, count: int) -> None:
        """Until so many fetches are under way."""
        with trio.fail_after(5):
            while self.fetching != count:
                await self.changed.wait()

    async def report(self, event: Event) -> None:
        """Tell the served plugin of an event, as the supervisor would."""
        assert self.tell is not None
        await self.tell(event)

    def has_layer(self, digest: Digest) -> bool:
        return digest in self.layers

    async def seal(self) -> None:
        self._check()
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if self.hold is not None:
                await self.hold.wait()
            self.sealed = True
        finally:
            self.running -= 1

    async def start(self, image_id: str, requested_environment: Sequence[str]) -> int:
        self._check()
        self.starts.append((image_id, tuple(requested_environment)))
        return len(self.starts)

    async def signal(self, container_id: int, signum: int) -> None:
        self._check()
        self.signals.append((container_id, signum))

    async def restart(self, container_id: int, *, timeout_s: float) -> None:
        self._check()
        self.restarts.append((container_id, timeout_s))

    async def invoke(self, container_id: int, invocation: Invocation) -> InvocationResult:
        self._check()
        self.invocations.append((container_id, invocation))
        self._count_invocations(1)
        try:
            if self.invoke_hold is not None:
                await self.invoke_hold.wait()
        finally:
            self._count_invocations(-1)
        return self.result

    def _count_invocations(self, more: int) -> None:
        self.invoking += more
        self.changed.set()
        self.changed = trio.Event()

    async def wait_for_invocations(self, count: int) -> None:
        """Until so many are under way."""
        with trio.fail_after(5):
            while self.invoking != count:
                await self.changed.wait()

    def log_page(self, container_id: int, *, after: int, max_lines: int) -> LogPage:
        return self._log(container_id).page(after=after, max_lines=max_lines)

    async def wait_for_log(self, container_id: int, *, after: int) -> None:
        await self._log(container_id).wait(after=after)

    def _log(self, container_id: int) -> ContainerLog:
        if container_id not in self.logs:
            raise UnknownItem(f"container {container_id}", "is not here")
        return self.logs[container_id]

    async def memory_bytes(self) -> dict[int, int]:
        self.memory_asked += 1
        return {1: 4096, 99: 1}

    def images(self) -> tuple[ImageView, ...]:
        return (
            ImageView(image_id=IMAGE_ID, names=("app:1",), executable=True, missing_layers=("x",)),
        )

    def manifest(self, image_id: str) -> ManifestUpload:
        if image_id != IMAGE_ID:
            raise UnknownItem(image_id, "is not here")
        return ManifestUpload(
            manifest='{"ä":1}'.encode(), signature=b"\x00", certificate_der=b"\x30\xff"
        )

    def containers(self) -> tuple[ContainerView, ...]:
        running = ContainerView(
            container_id=1,
            image_id=IMAGE_ID,
            state="running",
            since="2026-01-02T03:04:05Z",
            restarts=2,
            restartable=True,
            pid=77,
            exit_code=None,
            signal=None,
            out_of_memory=False,
            argv=("/app", "one"),
            environment=("A=1",),
            signals=(15,),
            log_fds=(1, 2),
            layers=(f"sha384/{'d' * 96}",),
            start_event_digest_sha384=START_DIGEST,
        )
        ended = msgspec.structs.replace(
            running, container_id=2, state="exited", pid=None, exit_code=3
        )
        killed = msgspec.structs.replace(ended, container_id=3, exit_code=None, signal=9)
        return running, ended, killed

    def status(self) -> bytes:
        return encode_status(
            Status(
                sealed=self.sealed,
                measurement="ok",
                images=(
                    ImageStatus(image_id=IMAGE_ID, names=(), executable=True, missing_layers=()),
                ),
                containers=(
                    ContainerStatus(
                        container_id=1,
                        image_id=IMAGE_ID,
                        state="running",
                        start_event_digest_sha384=START_DIGEST,
                    ),
                ),
                notes=(),
            )
        )

    async def evidence(self, nonce: bytes) -> bytes:
        self._check()
        self.nonces.append(nonce)
        return b'{"evidence":1}'

    async def acon_report(self, requestor_nonce: bytes, *, want_quote: bool) -> AconReport:
        self._check()
        self.nonces.append(requestor_nonce)
        return AconReport(
            data=b"\x01\xff" if want_quote else b"\x02",
            attestation_data="{}",
            rtmr_index=3,
            log_lines=("line one", "line two"),
        )


class FakeContainer:
    """One container's view. `refusal`, when set, is raised by its next call."""

    def __init__(self, container_id: int = 5) -> None:
        self.asked: list[tuple[bytes, str | None, bytes | None]] = []
        self.said: list[AttestationData | None] = []
        self.reports: list[tuple[bytes, AttestationData | None, bool]] = []
        self.report = AconReport(
            data=b"\x01\x00\xff",
            attestation_data='{"api_version":"1.0.0"}',
            rtmr_index=3,
            log_lines=("line one", "line two"),
        )
        self.refusal: Exception | None = None
        self.hold: trio.Event | None = None  # while set, `evidence` and reports wait for it
        self._container_id = container_id

    async def _check(self) -> None:
        if self.hold is not None:
            await self.hold.wait()
        if self.refusal is not None:
            raise self.refusal

    @property
    def container_id(self) -> int:
        return self._container_id

    @property
    def image_id(self) -> str:
        return IMAGE_ID

    async def evidence(
        self, nonce: bytes, *, public_key_sha384: str | None, user_data: bytes | None
    ) -> bytes:
        await self._check()
        self.asked.append((nonce, public_key_sha384, user_data))
        return b'{"container":%d}' % self._container_id

    def set_attestation_data(self, data: AttestationData | None) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.said.append(data)

    async def acon_report(
        self, requestor_nonce: bytes, data: AttestationData | None, *, want_quote: bool
    ) -> AconReport:
        await self._check()
        self.reports.append((requestor_nonce, data, want_quote))
        return self.report


def plugin(config: Settings, folder: Path) -> HttpApi:
    """The plugin as the host would make it."""
    context = PluginContext(
        name="http_api",
        runtime_dir=folder,
        log=structlog.stdlib.get_logger("http_api"),
        report=lambda event: None,
    )
    return HttpApi(config, context)


@asynccontextmanager
async def served(
    operations: FakeOperations, folder: Path, **settings: object
) -> AsyncIterator[Path]:
    """The management API on a Unix socket of its own; gone when the block ends."""
    socket = folder / "api.sock"
    config = msgspec.convert({"socket": str(socket), **settings}, Settings)
    api = plugin(config, folder)
    operations.tell = api.observe
    async with trio.open_nursery() as nursery:
        await nursery.start(api.serve, operations)
        yield socket
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def listening(path: Path) -> AsyncIterator[trio.SocketListener]:
    sock = trio.socket.socket(trio.socket.AF_UNIX)
    with sock:
        await sock.bind(str(path))
        sock.listen(64)
        yield trio.SocketListener(sock)


@asynccontextmanager
async def container_served(
    container: FakeContainer, folder: Path, api: HttpApi | None = None, **settings: object
) -> AsyncIterator[Path]:
    api = api or plugin(msgspec.convert(settings, Settings), folder)
    path = folder / f"{container.container_id}.sock"
    async with listening(path) as listener, trio.open_nursery() as nursery:
        await nursery.start(api.serve_container, listener, container)
        yield path
        nursery.cancel_scope.cancel()


class Answer(msgspec.Struct):
    """`kind` is that of the JSON error, if it is one."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> object:
        return msgspec.json.decode(self.body)

    @property
    def kind(self) -> str:
        return (
            msgspec.json.decode(self.body, type=dict[str, dict[str, str | None]])["error"]["kind"]
            or ""
        )


class RawClient:
    """Sends exactly the given bytes; reads answers with h11."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self.stream = stream
        self._left = b""

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def answer(self, method: str = "GET") -> Answer:
        """The next answer. Raises `EOFError` when the server closed without a whole one."""
        reader = h11.Connection(h11.CLIENT)
        reader.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
        reader.send(h11.EndOfMessage())
        if self._left:
            reader.receive_data(self._left)
        status, headers, body = 0, {}, bytearray()
        try:
            with trio.fail_after(10):
                while True:
                    event = reader.next_event()
                    if event is h11.NEED_DATA:
                        reader.receive_data(bytes(await self.stream.receive_some(65536)))
                    elif isinstance(event, h11.Response):
                        status = event.status_code
                        headers = {name.decode(): text.decode() for name, text in event.headers}
                    elif isinstance(event, h11.Data):
                        body += event.data
                    elif isinstance(event, h11.EndOfMessage):
                        break
        except (trio.BrokenResourceError, h11.RemoteProtocolError) as error:
            raise EOFError from error
        self._left = reader.trailing_data[0]
        return Answer(status, headers, bytes(body))


@asynccontextmanager
async def raw_client(socket: Path) -> AsyncIterator[RawClient]:
    async with await trio.open_unix_socket(str(socket)) as stream:
        yield RawClient(stream)


async def ask(
    socket: Path, method: str, target: str, *headers: str, body: bytes | None = None
) -> Answer:
    """One request over a connection of its own."""
    lines = [f"{method} {target} HTTP/1.1", "Host: td", *headers]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    head = "\r\n".join(lines) + "\r\n\r\n"
    async with raw_client(socket) as client:
        await client.send(head.encode() + (body or b""))
        return await client.answer(method)


async def ask_json(socket: Path, method: str, target: str, value: object = None) -> Answer:
    body = None if value is None else msgspec.json.encode(value)
    return await ask(socket, method, target, body=body)


def refusal_named(kind: type[Refusal]) -> Refusal:
    return kind("the item", "the rule", expected="this", actual="that")
