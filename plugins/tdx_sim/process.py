"""The software TD as a process: whatever its clients do, its registers go on, as hardware's.

It listens on two Unix sockets. The guest's (`socket_path`) offers what a TD offers its
guest. The owner's (`wire.owner_socket_path`) offers besides what a host can do: boot it
again. Both can be opened by the user who runs the simulator alone. A frame's format is in
`plugins.tdx_sim.wire`.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import trio

from plugins.tdx_sim import wire
from plugins.tdx_sim.firmware import BaseImage
from plugins.tdx_sim.pki import SimPki
from plugins.tdx_sim.software_td import SoftwareTd
from supervisor import ConfigError, Conflict

MAX_CONNECTIONS = 128  # further ones are told EBUSY at once
REQUEST_TIMEOUT_S = 10.0  # for a client to say what it wants
REPLY_TIMEOUT_S = 10.0  # for a client to take its answer
_BACKLOG = 128

_log = logging.getLogger(__name__)


async def serve(
    socket_path: Path | str,
    pki: SimPki,
    *,
    base_image: BaseImage | None = None,
    quote_delay_s: float = 0.0,
    task_status: trio.TaskStatus[Path] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Boot a software TD and serve it until cancelled; `started` gives the guest's socket.

    `quote_delay_s` is how long each quote takes, as hardware's do; quotes wait side by side.
    The registers live as long as this call. Both sockets are removed at its end; the lock
    file beside them stays. Raises `Conflict` if another software TD serves there, `ConfigError`
    if nothing can be served there.
    """
    if quote_delay_s < 0:
        raise ConfigError("quote_delay_s", "it is not negative", actual=quote_delay_s)
    path = Path(socket_path)
    with _sole_owner(path):
        td = SoftwareTd(pki, base_image or BaseImage())
        limiter = trio.CapacityLimiter(MAX_CONNECTIONS)
        guest = partial(_serve_connection, td, limiter, quote_delay_s, False)
        owner = partial(_serve_connection, td, limiter, quote_delay_s, True)
        async with (
            _listening(path) as guest_listener,
            _listening(wire.owner_socket_path(path)) as owner_listener,
            trio.open_nursery() as nursery,
        ):
            await nursery.start(trio.serve_listeners, guest, [guest_listener])
            await nursery.start(trio.serve_listeners, owner, [owner_listener])
            _log.warning("SIMULATION: a software TD, which protects nothing, serves at %s", path)
            task_status.started(path)


# --- sockets -------------------------------------------------------------------------------


@contextmanager
def _sole_owner(path: Path) -> Iterator[None]:
    """Hold the lock beside the socket. The kernel lets go of it when the process dies."""
    lock_path = path.with_name(path.name + ".lock")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(
            lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
    except OSError as error:
        raise ConfigError(str(path), "a socket can be made there", actual=error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(str(path), "another software TD serves there already") from error
        yield
    finally:
        os.close(descriptor)


@asynccontextmanager
async def _listening(path: Path) -> AsyncIterator[trio.SocketListener]:
    """A listening socket of mode 0600, removed afterwards. The caller holds the lock."""
    with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM) as sock:
        try:
            _remove_socket(path)
            await sock.bind(os.fspath(path))
            try:
                # Nobody can connect before `listen`, so the mode is right from the first moment.
                os.chmod(path, 0o600)
                sock.listen(_BACKLOG)
            except BaseException:
                _remove_socket(path)
                raise
        except OSError as error:
            raise ConfigError(str(path), "a socket can be made there", actual=error) from error
        try:
            yield trio.SocketListener(sock)
        finally:
            _remove_socket(path)


def _remove_socket(path: Path) -> None:
    """Remove what a predecessor left; anything but a socket is not ours to remove."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(str(path), "it is a socket, or not there")
        path.unlink()
    except FileNotFoundError:
        return


# --- connections ---------------------------------------------------------------------------


async def _serve_connection(
    td: SoftwareTd,
    limiter: trio.CapacityLimiter,
    quote_delay_s: float,
    is_owner: bool,
    stream: trio.SocketStream,
) -> None:
    """One request, one reply. No client's behaviour may end the TD: nothing is raised."""
    async with stream:
        try:
            limiter.acquire_on_behalf_of_nowait(stream)
        except trio.WouldBlock:
            await _reply(stream, _failure(errno.EBUSY, "too many connections"))
            return
        try:
            request = await _request(stream)
            if request is None:
                return
            reply: wire.Reply
            try:
                reply = await _answer(td, request, quote_delay_s=quote_delay_s, is_owner=is_owner)
            except OSError as error:
                reply = _failure(error.errno or errno.EIO, error.strerror or str(error))
            except Exception:
                # A fault of ours must not cost the registers, any more than a client's may.
                _log.exception("the request failed")
                reply = _failure(errno.EIO, "the software TD failed; its log says why")
            await _reply(stream, reply)
        finally:
            limiter.release_on_behalf_of(stream)


async def _request(stream: trio.SocketStream) -> wire.Request | None:
    """The request; None (after a refusal, where one can be sent) if it is none."""
    try:
        with trio.fail_after(REQUEST_TIMEOUT_S):
            header = await _receive_exactly(stream, wire.HEADER_BYTES)
            size = wire.body_size(header, limit_bytes=wire.MAX_REQUEST_BYTES)
            return wire.parse_request(await _receive_exactly(stream, size))
    except (EOFError, trio.BrokenResourceError):
        return None
    except trio.TooSlowError:
        await _reply(stream, _failure(errno.ETIMEDOUT, "no request in time"))
    except ValueError as error:
        await _reply(stream, _failure(errno.EINVAL, str(error)))
    return None


async def _receive_exactly(stream: trio.SocketStream, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        chunk = await stream.receive_some(size - len(received))
        if not chunk:
            raise EOFError
        received += chunk
    return bytes(received)


async def _reply(stream: trio.SocketStream, reply: wire.Reply) -> None:
    with trio.move_on_after(REPLY_TIMEOUT_S):
        try:
            await stream.send_all(wire.pack(reply))
        except trio.BrokenResourceError:
            # The client is gone. What it asked for happened all the same.
            return


async def _answer(
    td: SoftwareTd, request: wire.Request, *, quote_delay_s: float, is_owner: bool
) -> wire.Reply:
    """What the TD does, without a checkpoint between (quotes apart). Raises `OSError`."""
    match request:
        case wire.Describe():
            return td.describe()
        case wire.ReadRegister(rtmr_index=index):
            return wire.Blob(data=td.registers.read(index))
        case wire.ExtendRegister(rtmr_index=index, digest_sha384=digest):
            td.registers.extend(index, digest)
            return wire.Done()
        case wire.MakeTdReport(report_data=report_data):
            return wire.Blob(data=td.td_report(report_data))
        case wire.MakeQuote(report_data=report_data, version=version):
            pending = td.begin_quote(report_data, version)
            await trio.sleep(quote_delay_s)
            return wire.Blob(data=td.finish_quote(pending))
        case wire.ReadBootLog():
            return wire.Blob(data=td.boot_log)
        case wire.Boot(base_image=base_image):
            if not is_owner:
                raise OSError(errno.EPERM, "a guest cannot boot its TD")
            td.boot(base_image)
            _log.warning("SIMULATION: the software TD was booted again")
            return td.describe()


def _failure(number: int, message: str) -> wire.Failure:
    return wire.Failure(error=errno.errorcode.get(number, "EIO"), message=message)
