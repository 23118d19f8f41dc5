"""The client against the real server, and against servers that misbehave."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import structlog
import trio
from acon_daemon import daemon_that
from http_fakes import IMAGE_ID, FakeOperations, RawClient, ask, refusal_named, served
from starlette.responses import JSONResponse
from tls_files import make_tls_files

import supervisor.errors
from acon import client as client_module
from acon.client import Client
from acon.connection import ConnectionFailed
from acon.tar_source import FileTar
from plugins.http_api.connections import tls_listener
from plugins.http_api.listeners import tls_context
from plugins.http_api.server import HttpServer
from plugins.http_api.settings import TcpSettings
from supervisor.errors import (
    ConfigError,
    Conflict,
    DeadlineExceeded,
    DigestMismatch,
    FormatError,
    Refusal,
    UnknownItem,
)
from supervisor.events import LayerProgress
from supervisor.formats.digest import Digest, digest_of
from supervisor.operations import ManifestUpload
from supervisor.seams import FileBlob

DATA = bytes(range(256)) * 8192  # 2 MiB
DIGEST = digest_of("sha384", DATA)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_UPLOAD_PAUSE_S", 0.02)
    monkeypatch.setattr(client_module, "_PROGRESS_PAUSE_S", 0.02)


@pytest.fixture
def tar(tmp_path: Path) -> FileTar:
    path = tmp_path / "layer.tar"
    path.write_bytes(DATA)
    return FileTar(path)


async def test_every_call_reaches_the_daemon_and_its_answer_is_typed(tmp_path: Path) -> None:
    operations = FakeOperations()
    image = ManifestUpload(manifest=b"m\x00", signature=b"\xff", certificate_der=b"\x30")
    blob = FileBlob(file="/oci/blob", blob_digest="sha256:1", media_type="tar", size_bytes=9)
    async with served(operations, tmp_path) as socket, Client.over_socket(socket) as client:
        admitted = await client.admit([image])
        images = await client.images()
        absent = await client.layer_state(DIGEST)
        await client.fetch_layer(DIGEST, blob)
        fetched = await client.layer_state(DIGEST)
        await client.seal()
        container_id = await client.start(IMAGE_ID, ["A=1"])
        containers = await client.containers()
        await client.signal(container_id, -9)
        status = await client.status()
        evidence = await client.evidence(b"\x07" * 16)
    assert operations.groups == [(image,)]
    assert admitted.missing_layers == ("x",)
    assert images == operations.images()
    assert (absent.state, absent.received_bytes) == ("absent", 0)
    assert operations.fetched == [blob]
    assert (fetched.state, fetched.received_bytes) == ("verified", None)
    assert status.sealed
    assert operations.starts == [(IMAGE_ID, ("A=1",))]
    assert [msgspec.structs.asdict(one) for one in containers] == [
        msgspec.structs.asdict(one) | {"memory_bytes": None} for one in operations.containers()
    ]
    assert operations.signals == [(1, -9)]
    assert operations.nonces == [b"\x07" * 16]
    assert evidence == b'{"evidence":1}'


@pytest.mark.parametrize(
    "kind",
    sorted({getattr(supervisor.errors, name) for name in supervisor.errors.__all__}, key=str),
)
async def test_what_the_daemon_refused_is_raised_here_as_it_was_there(
    tmp_path: Path, kind: type[Refusal]
) -> None:
    operations = FakeOperations()
    operations.refusal = refusal_named(kind)
    async with served(operations, tmp_path) as socket, Client.over_socket(socket) as client:
        with pytest.raises(Refusal) as caught:
            await client.seal()
    assert type(caught.value) is kind
    assert caught.value.to_dict() == refusal_named(kind).to_dict()


async def test_a_layer_is_sent_with_progress(tmp_path: Path, tar: FileTar) -> None:
    operations = FakeOperations()
    progress: list[tuple[int, int]] = []
    async with served(operations, tmp_path) as socket, Client.over_socket(socket) as client:
        await client.upload_layer(
            DIGEST, tar, progress=lambda sent, total: progress.append((sent, total))
        )
        await client.upload_layer(DIGEST, tar)
    assert operations.layers == {DIGEST: DATA}
    assert progress[-1] == (len(DATA), len(DATA))
    assert progress == sorted(progress)
    assert len(progress) > 4
    assert len(operations.uploads) == 1


async def test_a_fetch_tells_how_far_it_is_and_the_end(tmp_path: Path) -> None:
    operations = FakeOperations()
    operations.fetch_hold = trio.Event()
    blob = FileBlob(file="/blob", media_type="tar", size_bytes=900)
    told: list[tuple[int, int | None]] = []
    heard = trio.Event()

    def progress(received: int, total: int | None) -> None:
        told.append((received, total))
        heard.set()

    async with served(operations, tmp_path) as socket, Client.over_socket(socket) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: client.fetch_layer(DIGEST, blob, progress=progress))
            await operations.wait_for_fetches(1)
            for received, total in ((300, 900), (301, None)):
                await operations.report(
                    LayerProgress(digest=str(DIGEST), received_bytes=received, total_bytes=total)
                )
                heard = trio.Event()
                with trio.fail_after(5):
                    await heard.wait()
            operations.fetch_hold.set()
        # Told at once, without progress to tell: it is here already.
        await client.fetch_layer(DIGEST, blob)
    assert (300, 900) in told and (301, None) in told
    assert told[-1] == (900, 900)
    assert len(told) <= 6


async def test_a_fetch_goes_on_although_nobody_can_say_how_far_it_is(tmp_path: Path) -> None:
    asked = 0

    async def answer_slowly(stream: trio.SocketStream) -> None:
        nonlocal asked
        async with stream:
            request = await stream.receive_some(65536)
            if request.startswith(b"GET"):
                asked += 1
                await stream.send_all(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n")
                return
            await trio.sleep(0.1)
            body = b'{"state":"verified"}'
            await stream.send_all(
                b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
            )

    told: list[tuple[int, int | None]] = []
    blob = FileBlob(file="/blob", media_type="tar", size_bytes=9)
    async with daemon_that(answer_slowly, tmp_path) as client:
        await client.fetch_layer(DIGEST, blob, progress=lambda *counts: told.append(counts))
    assert asked >= 1
    assert told == [(9, 9)]


async def test_a_refused_fetch_is_raised_as_it_was_there_with_progress_too(
    tmp_path: Path,
) -> None:
    operations = FakeOperations()
    operations.refusal = refusal_named(DigestMismatch)
    blob = FileBlob(file="/blob", media_type="tar", size_bytes=9)
    told: list[tuple[int, int | None]] = []
    async with served(operations, tmp_path) as socket, Client.over_socket(socket) as client:
        with pytest.raises(DigestMismatch):
            await client.fetch_layer(DIGEST, blob, progress=lambda *counts: told.append(counts))
    assert told == []


async def test_an_upload_waits_for_a_fetch_of_somebody_else_and_is_not_needed_then(
    tmp_path: Path, tar: FileTar
) -> None:
    operations = FakeOperations()
    operations.fetch_hold = trio.Event()
    blob = FileBlob(file="/blob", media_type="tar", size_bytes=9)
    async with (
        served(operations, tmp_path) as socket,
        Client.over_socket(socket) as client,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(client.fetch_layer, DIGEST, blob)
        await operations.wait_for_fetches(1)
        nursery.start_soon(client.upload_layer, DIGEST, tar)
        await trio.sleep(0.3)  # more than all attempts of an upload take here
        operations.fetch_hold.set()
    assert operations.uploads == []


async def test_a_fetch_that_never_ends_does_not_hold_an_upload_for_ever(
    tmp_path: Path, tar: FileTar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_TRANSFER_TIMEOUT_S", 0.2)

    async def arriving(stream: trio.SocketStream) -> None:
        async with stream:
            while await stream.receive_some(65536):
                body = b'{"state":"arriving","received_bytes":1,"total_bytes":2}'
                await stream.send_all(
                    b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
                )

    async with daemon_that(arriving, tmp_path) as client:
        with pytest.raises(DeadlineExceeded, match="fetch must end"):
            await client.upload_layer(DIGEST, tar)


@asynccontextmanager
async def cutting_proxy(upstream: Path, *, after_bytes: int, times: int) -> AsyncIterator[Path]:
    """A socket in front of another that cuts its first `times` long uploads."""
    path = upstream.with_name("proxy.sock")
    cuts_left = times

    async def carry(stream: trio.SocketStream) -> None:
        nonlocal cuts_left
        carried = 0
        async with (
            await trio.open_unix_socket(str(upstream)) as onward,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(_copy, onward, stream)
            async for chunk in stream:
                await onward.send_all(chunk)
                carried += len(chunk)
                if cuts_left and carried > after_bytes:
                    cuts_left -= 1
                    break
            nursery.cancel_scope.cancel()

    sock = trio.socket.socket(trio.socket.AF_UNIX)
    with sock:
        await sock.bind(str(path))
        sock.listen()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, carry, [trio.SocketListener(sock)])
            yield path
            nursery.cancel_scope.cancel()


async def _copy(source: trio.SocketStream, target: trio.SocketStream) -> None:
    async for chunk in source:
        await target.send_all(chunk)


class WatchedTar(FileTar):
    """Remembers from where it was read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.offsets: list[int] = []

    def chunks(self, offset: int) -> Generator[bytes, None, None]:
        self.offsets.append(offset)
        return super().chunks(offset)


async def test_a_broken_upload_goes_on_where_it_was(tmp_path: Path, tar: FileTar) -> None:
    operations = FakeOperations()
    watched = WatchedTar(tmp_path / "layer.tar")
    with trio.fail_after(20):
        async with (
            served(operations, tmp_path) as socket,
            cutting_proxy(socket, after_bytes=256 << 10, times=3) as proxy,
            Client.over_socket(proxy) as client,
        ):
            await client.upload_layer(DIGEST, watched)
    assert operations.layers == {DIGEST: DATA}
    assert len(operations.uploads) == 1
    assert watched.offsets[0] == 0
    assert watched.offsets[-1] > 512 << 10


@pytest.mark.parametrize("change", [-1, 1])
async def test_a_tar_that_changes_while_it_is_sent_is_noticed(
    tmp_path: Path, tar: FileTar, change: int
) -> None:
    class Changing(FileTar):
        @property
        def size_bytes(self) -> int:
            return super().size_bytes + change

    async with served(FakeOperations(), tmp_path) as socket, Client.over_socket(socket) as client:
        with pytest.raises(FormatError, match="does not change"):
            await client.upload_layer(DIGEST, Changing(tmp_path / "layer.tar"))


@pytest.mark.parametrize("left_bytes", [b"wrong", DATA[:5]], ids=["wrong", "right"])
@pytest.mark.parametrize("total_bytes", [len(DATA), 99], ids=["same size", "other size"])
async def test_what_another_client_left_behind_does_not_stop_an_upload(
    tmp_path: Path, tar: FileTar, left_bytes: bytes, total_bytes: int
) -> None:
    operations = FakeOperations()
    async with served(operations, tmp_path) as socket, Client.over_socket(socket) as client:
        parked = await ask(
            socket,
            "PUT",
            f"/api/v2/layers/{DIGEST}",
            f"Content-Range: bytes 0-4/{total_bytes}",
            body=left_bytes,
        )
        assert parked.status == 200
        with trio.fail_after(20):
            await client.upload_layer(DIGEST, tar)
    assert operations.layers == {DIGEST: DATA}


async def test_an_upload_that_gets_nowhere_is_given_up(tmp_path: Path, tar: FileTar) -> None:
    connections = 0

    async def hang_up_on_puts(stream: trio.SocketStream) -> None:
        nonlocal connections
        while b"\r\n\r\n" in (request := await stream.receive_some(65536)):
            if request.startswith(b"PUT"):
                connections += 1
                return
            body = b'{"state":"absent","received_bytes":0}'
            await stream.send_all(
                b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
            )

    with trio.fail_after(20):
        async with daemon_that(hang_up_on_puts, tmp_path) as client:
            with pytest.raises(ConnectionFailed) as caught:
                await client.upload_layer(DIGEST, tar)
    assert caught.value.item.endswith("odd.sock")
    assert connections == 5


async def test_wrong_bytes_are_not_sent_again_and_again(tmp_path: Path, tar: FileTar) -> None:
    operations = FakeOperations()
    other = digest_of("sha384", b"other")
    async with served(operations, tmp_path) as socket, Client.over_socket(socket) as client:
        with pytest.raises(DigestMismatch):
            await client.upload_layer(other, tar)
    assert len(operations.uploads) == 1


async def test_a_layer_that_somebody_else_sends_is_waited_for_and_then_given_up(
    tmp_path: Path, tar: FileTar
) -> None:
    operations = FakeOperations()
    head = f"PUT /api/v2/layers/{DIGEST} HTTP/1.1\r\nHost: td\r\nContent-Length: 9\r\n\r\n"
    async with served(operations, tmp_path) as socket, Client.over_socket(socket) as client:
        async with await trio.open_unix_socket(str(socket)) as first:
            await RawClient(first).send(head.encode() + b"1")
            await operations.wait_for_upload(0, 1)
            with pytest.raises(Conflict):
                await client.upload_layer(DIGEST, tar)
        await client.upload_layer(DIGEST, tar)
    assert operations.layers == {DIGEST: DATA}


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda path: None, "is acond running"),
        (lambda path: _dead_socket(path), "nobody listens"),
    ],
)
async def test_a_daemon_that_is_not_there_is_named_with_a_hint(
    tmp_path: Path, prepare: Callable[[Path], None], words: str
) -> None:
    path = tmp_path / "api.sock"
    prepare(path)
    async with Client.over_socket(path) as client:
        with pytest.raises(ConnectionFailed) as caught:
            await client.seal()
    assert caught.value.item == str(path)
    assert words in caught.value.rule


def _dead_socket(path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


async def test_a_socket_that_may_not_be_used_is_named_with_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may use every socket, so the kernel's answer is played.
    async def forbidden(path: str) -> trio.SocketStream:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(trio, "open_unix_socket", forbidden)
    async with Client.over_socket(tmp_path / "api.sock") as client:
        with pytest.raises(ConnectionFailed, match="try as root"):
            await client.seal()


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"", ConnectionFailed),
        (b"nonsense\r\n\r\n", ConnectionFailed),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", ConnectionFailed),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{", FormatError),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n{"images":[1]', FormatError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", FormatError),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 2\r\n\r\nno", Refusal),
        (b"HTTP/1.1 302 Go\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n", FormatError),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n" + bytes(9 << 20),
            FormatError,
            # httpx leaves its own generators unfinished when an answer is not read to its end.
            marks=pytest.mark.filterwarnings("ignore:Async generator 'http:ResourceWarning"),
        ),
    ],
    ids=["closed", "noise", "short", "half", "wrong", "empty", "reasonless", "redirect", "huge"],
)
async def test_a_daemon_that_answers_wrongly_is_not_believed(
    tmp_path: Path, answer: bytes, kind: type[Refusal]
) -> None:
    async def reply(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some(65536)
            try:
                await stream.send_all(answer)
            except trio.BrokenResourceError:
                return  # the client had enough

    with trio.fail_after(20):
        async with daemon_that(reply, tmp_path) as client:
            with pytest.raises(Refusal) as caught:
                await client.images()
    assert type(caught.value) is kind


async def test_an_unknown_kind_of_refusal_keeps_its_words(tmp_path: Path) -> None:
    body = b'{"error":{"kind":"new","item":"i","rule":"r","message":"m"}}'

    async def reply(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some(65536)
            await stream.send_all(
                b"HTTP/1.1 400 Bad\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
            )

    async with daemon_that(reply, tmp_path) as client:
        with pytest.raises(Refusal) as caught:
            await client.seal()
    assert (type(caught.value), str(caught.value)) == (Refusal, "i: r")


async def test_over_tls_the_given_root_decides(tmp_path: Path) -> None:
    """The server here judges no addresses: the test itself calls from its own machine."""
    files = make_tls_files(tmp_path, "127.0.0.1")
    context = tls_context(
        TcpSettings(
            address="127.0.0.1", port=1, certificate=str(files.certificate), key=str(files.key)
        )
    )
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    url = f"https://127.0.0.1:{listener.socket.getsockname()[1]}"
    server = HttpServer(
        JSONResponse({}), log=structlog.stdlib.get_logger(), max_connections=9, shutdown_s=0.2
    )
    async with listener, trio.open_nursery() as nursery:
        await nursery.start(server.serve, tls_listener(listener, context))
        async with Client.over_url(url, ca_file=files.certificate) as client:
            await client.seal()
        async with Client.over_url(url, verify=False) as client:
            await client.seal()
        async with Client.over_url(url) as client:
            with pytest.raises(ConnectionFailed) as caught:
                await client.seal()
        nursery.cancel_scope.cancel()
    assert "CERTIFICATE_VERIFY_FAILED" in str(caught.value)


def test_only_https_is_spoken_over_tcp() -> None:
    with pytest.raises(ConfigError, match="https://"):
        Client.over_url("http://127.0.0.1:1")
    with pytest.raises(ConfigError, match="nowhere"):
        Client.over_url("https://127.0.0.1:1", ca_file=Path("/nowhere.pem"))


async def test_a_layer_that_nobody_named_is_the_callers_mistake(
    tmp_path: Path, tar: FileTar
) -> None:
    operations = FakeOperations()
    operations.refusal = refusal_named(UnknownItem)
    async with served(operations, tmp_path) as socket, Client.over_socket(socket) as client:
        with pytest.raises(UnknownItem):
            await client.upload_layer(Digest("sha384", "0" * 96), tar)
