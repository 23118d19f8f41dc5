"""The process that sees unverified bytes: what it cannot do, and how it ends."""

from __future__ import annotations

import gzip
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from hypothesis import example, given
from hypothesis import strategies as st
from inflate_rig import attempt, children, pipes

from plugins.image_store.inflate import process
from plugins.image_store.inflate.confinement import MAX_CPU_S, MAX_MEMORY_BYTES, UNUSED_ID
from plugins.image_store.inflate.process import Inflater, inflating
from plugins.image_store.inflate.system_calls import CALLS, filter_program
from plugins.image_store.inflate.worker import LIBRARIES
from supervisor import Refusal, RuntimeFailed, Untrusted

PLAIN = os.urandom(100_000)
BLOB = gzip.compress(PLAIN)

ACTIONS = {
    "open a file": ("os.open('/etc/passwd', os.O_RDONLY)", "EMFILE"),
    "use what it inherited": ("os.fstat(inherited)", "EBADF"),
    "look at a file": ("os.stat('/etc')", "ENOENT"),
    "make a file": ("os.mkdir('/x')", "EROFS"),
    "make a socket": ("socket.socket(socket.AF_INET)", "EMFILE"),
    "make a pipe": ("os.pipe()", "EMFILE"),
    "fork": ("os.fork()", "EAGAIN"),
    "trace its parent": ("checked(libc.ptrace(16, parent, 0, 0))", "EPERM"),
    "signal its parent": ("os.kill(parent, 0)", "EPERM"),
    "become root": ("os.setresuid(0, 0, 0)", "EPERM"),
    "mount": ("checked(libc.mount(b'x', b'/', b'tmpfs', 0, None))", "EPERM"),
    "leave its root": ("os.chroot('/')", "EPERM"),
    "lift a limit": ("confinement.resource.setrlimit(7, (9, 9))", None),
    "map code": ("mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)", "done"),
    "run a program": ("os.execv('/bin/true', ['true'])", "ENOENT"),
    "write to standard input": ("os.write(0, b'x')", None),
    "become visible": ("checked(libc.prctl(4, 1, 0, 0, 0))", "done"),
    "ask who it is": ("os.getuid()", "done"),
}


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = children(), pipes()
    yield
    assert (children(), pipes()) == before


@pytest.mark.root
@pytest.mark.parametrize("action", list(ACTIONS))
def test_a_confined_process_is_killed_when_it_tries_to(action: str) -> None:
    assert attempt(ACTIONS[action][0]) == (-signal.SIGSYS, "")


@pytest.mark.root
@pytest.mark.parametrize(
    "action", [name for name, (_, refusal) in ACTIONS.items() if refusal not in ("done", None)]
)
def test_even_without_the_system_call_filter_it_could_not(action: str) -> None:
    code, refusal = ACTIONS[action]
    assert attempt(code, how="give_up_rights") == (0, refusal)


@pytest.mark.root
def test_its_memory_has_a_bound_and_reading_writing_and_ending_are_all_it_can() -> None:
    too_much = f"bytearray({MAX_MEMORY_BYTES})"
    assert attempt(too_much) == (0, "MemoryError")
    assert attempt("bytearray(1 << 25)") == (0, "done")
    assert attempt("os.read(0, 1)") == (0, "done")
    assert attempt("os.write(2, b'')") == (0, "done")


def test_without_root_there_is_less_to_give_up_and_the_filter_still_holds() -> None:
    uid = UNUSED_ID if os.geteuid() == 0 else 0
    assert attempt("os.read(0, 1)", uid=uid) == (0, "done")
    for action in ("open a file", "make a socket", "fork"):
        assert attempt(ACTIONS[action][0], uid=uid) == (-signal.SIGSYS, "")


@pytest.mark.root
@pytest.mark.parametrize("uid", [0, UNUSED_ID])
def test_nobody_may_look_into_it_and_its_time_is_bounded(uid: int) -> None:
    is_dumpable = "os._exit(10 + libc.prctl(3, 0, 0, 0, 0))"
    assert attempt(is_dumpable, how="give_up_rights", uid=uid) == (10, "")
    limit = "resource.getrlimit(resource.RLIMIT_CPU)"
    told = f"import resource; os.write(1, repr({limit}).encode()); os._exit(0)"
    assert attempt(told, how="give_up_rights", uid=uid) == (0, f"({MAX_CPU_S}, {MAX_CPU_S})")


# --- the filter as such ---------------------------------------------------------------------


def judged(program: bytes, architecture: int, number: int, arguments: tuple[int, ...]) -> bool:
    """Whether a classic BPF machine lets the call pass (the instructions that we use)."""
    data = struct.pack("=IIQ6Q", number, architecture, 0, *arguments)
    accumulator = at = 0
    while True:
        code, if_true, if_false, value = struct.unpack_from("=HBBI", program, at * 8)
        at += 1
        if code == 0x20:
            accumulator = struct.unpack_from("=I", data, value)[0]
        elif code == 0x15:
            at += if_true if accumulator == value else if_false
        elif code == 0x45:
            at += if_true if accumulator & value else if_false
        else:
            assert code == 0x06
            assert value in (0x7FFF0000, 0x80000000)
            return bool(value == 0x7FFF0000)


@pytest.mark.parametrize("machine", list(CALLS))
@given(
    number=st.one_of(st.integers(0, 500), st.integers(0, 2**32 - 1)),
    first=st.integers(0, 2**64 - 1),
    third=st.integers(0, 2**64 - 1),
)
@example(number=0, first=0, third=0)
@example(number=0x40000000, first=0, third=0)
def test_the_filter_lets_pass_what_is_listed_and_nothing_else(
    machine: str, number: int, first: int, third: int
) -> None:
    calls = CALLS[machine]
    program = filter_program(calls)
    here, word = calls.audit_architecture, first % 2**32
    wanted = (
        number in calls.others
        or (number == calls.read and word == 0)
        or (number == calls.write and word in (1, 2))
        or (number in (calls.mmap, calls.mprotect) and not third & 4)
    )
    arguments = (first, 0, third, 0, 0, 0)
    assert judged(program, here, number, arguments) == wanted
    for other in {each.audit_architecture for each in CALLS.values()} - {here}:
        assert not judged(program, other, number, arguments)


@pytest.mark.parametrize("machine", list(CALLS))
def test_every_listed_call_passes(machine: str) -> None:
    calls = CALLS[machine]
    program = filter_program(calls)
    for number in (*calls.others, calls.read, calls.mmap, calls.mprotect):
        assert judged(program, calls.audit_architecture, number, (0,) * 6)
    for descriptor in range(4):
        arguments = (descriptor, 0, 0, 0, 0, 0)
        passes = judged(program, calls.audit_architecture, calls.write, arguments)
        assert passes == (descriptor in (1, 2))


# --- a live one -----------------------------------------------------------------------------


async def take(worker: Inflater, size_bytes: int) -> bytes:
    """So many plain bytes: once there are any, it is confined."""
    taken = bytearray()
    buffer = bytearray(1 << 16)
    while len(taken) < size_bytes:
        count = await trio.to_thread.run_sync(worker.take, memoryview(buffer))
        assert count
        taken += buffer[:count]
    return bytes(taken)


@pytest.mark.root
async def test_a_live_worker_has_no_rights_no_files_and_no_network() -> None:
    async with inflating("gzip", item="blob") as worker:
        worker.feed(BLOB)
        assert await take(worker, len(PLAIN)) == PLAIN
        here = Path(f"/proc/{worker.pid}")
        status = dict(line.split(":\t", 1) for line in (here / "status").read_text().splitlines())
        for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(status[kind], 16) == 0
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        for ids in ("Uid", "Gid"):
            assert set(status[ids].split()) == {str(UNUSED_ID)}
        assert status["Groups"].strip() == ""
        assert sorted(os.listdir(here / "fd")) == ["0", "1", "2"]
        assert os.listdir(here / "root") == []
        mounts = (here / "mountinfo").read_text().splitlines()
        assert [line.split()[4] for line in mounts] == ["/"]
        devices = (here / "net" / "dev").read_text().splitlines()[2:]
        assert [line.split(":")[0].strip() for line in devices] in ([], ["lo"])
        for kind in ("net", "mnt", "ipc", "uts", "cgroup"):
            assert os.readlink(here / "ns" / kind) != os.readlink(f"/proc/self/ns/{kind}")
        assert (here / "environ").read_bytes() == b""
        worker.end_input()
        with trio.fail_after(10):
            await worker.watch()
        assert worker.refusal() is None


@pytest.mark.root
async def test_its_memory_does_not_grow_with_the_layer() -> None:
    blob = gzip.compress(bytes(16 << 20), compresslevel=1)
    async with inflating("gzip", item="blob") as worker:
        resident_bytes = []
        for _ in range(3):
            worker.feed(blob)
            await take(worker, 16 << 20)
            text = Path(f"/proc/{worker.pid}/status").read_text()
            resident_bytes.append(int(text.partition("VmHWM:")[2].split()[0]) * 1024)
        assert resident_bytes[0] < 32 << 20
        assert resident_bytes[2] - resident_bytes[0] < 1 << 20


async def ending_of(compression: process.Compression, blob: bytes) -> Refusal | None:
    async with inflating(compression, item="blob") as worker:
        worker.feed(blob)
        worker.end_input()
        with trio.fail_after(10):
            await worker.watch()
        return worker.refusal()


@pytest.mark.root
async def test_a_damaged_stream_is_told_in_the_decoder_s_words() -> None:
    refusal = await ending_of("gzip", BLOB[:-1])
    assert type(refusal) is Untrusted
    assert (refusal.item, refusal.rule) == ("blob", "the gzip stream must be complete")
    assert refusal.actual == "it ends too early"
    assert type(await ending_of("zstd", BLOB)) is Untrusted
    assert await ending_of("gzip", BLOB) is None


@pytest.mark.root
async def test_a_worker_that_cannot_give_up_its_rights_reads_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    confinement = "sys.modules['plugins.image_store.inflate.confinement']"
    for broken in ("CALLS = {}", "_CLONE_NEWNET = 1", "_CAPABILITY_VERSION_3 = 0"):
        start = process.START.replace("main(comp", f"{confinement}.{broken}\nmain(comp")
        with monkeypatch.context() as patch:
            patch.setattr(process, "START", start)
            refusal = await ending_of("gzip", BLOB)
        assert type(refusal) is RuntimeFailed
        assert "could not give up all its rights" in refusal.rule


@pytest.mark.parametrize(
    ("program", "kind", "actual"),
    [
        ("import os; os.kill(os.getpid(), 31)", Untrusted, "SIGSYS"),
        ("import os; os.kill(os.getpid(), 11)", Untrusted, "SIGSEGV"),
        ("import os; os.kill(os.getpid(), 9)", RuntimeFailed, "SIGKILL"),
        ("import os; os._exit(5)", Untrusted, None),
        ("import os; os._exit(77)", RuntimeFailed, "status 77"),
        ("import os; os.write(2, b'his own rule\\twords'); os._exit(3)", RuntimeFailed, "status 3"),
        ("import os; os._exit(3)", RuntimeFailed, "status 3"),
    ],
)
async def test_each_end_has_its_sentence(
    monkeypatch: pytest.MonkeyPatch, program: str, kind: type[Refusal], actual: str | None
) -> None:
    monkeypatch.setattr(process, "START", program)
    refusal = await ending_of("gzip", b"")
    assert type(refusal) is kind
    assert refusal.actual == actual
    assert "his own rule" not in str(refusal)


async def test_what_a_worker_says_is_cut_and_cleaned(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "must be a valid gzip stream\\t\\x1b[31mred\\n" + "x" * 100_000
    program = f"import os; os.set_blocking(2, False); os.write(2, b'{said}'); os._exit(3)"
    monkeypatch.setattr(process, "START", program)
    refusal = await ending_of("gzip", b"")
    assert isinstance(refusal, Untrusted)
    assert refusal.actual is not None
    assert refusal.actual.startswith("[31mredxxx")
    assert len(refusal.actual) < process.MAX_WORDS
    assert refusal.actual.isprintable()


async def test_a_worker_that_hangs_is_gone_when_its_caller_is_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "START", "import time; time.sleep(600)")
    with trio.fail_after(10):
        with trio.move_on_after(0.2) as scope:
            await ending_of("gzip", b"")
        assert scope.cancelled_caught


async def test_without_the_library_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIBRARIES, "gzip", "no_such_library")
    with pytest.raises(RuntimeFailed) as caught:
        await ending_of("gzip", BLOB)
    assert "no_such_library" in str(caught.value)


def test_the_daemon_itself_loads_no_decompressor() -> None:
    program = "import sys, plugins.image_store; print(*sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert {"isal", "zstandard", "httpx"} & set(ended.stdout.split()) == set()


def test_an_end_by_a_signal_without_a_name_is_told_too() -> None:
    assert process._ending(-(signal.SIGRTMIN + 5)) == f"signal {signal.SIGRTMIN + 5}"
    assert process._ending(-signal.SIGKILL) == "SIGKILL"
