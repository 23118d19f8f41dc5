"""Downloads: broken, stalled, lying about lengths and ranges."""

from __future__ import annotations

import os

import msgspec
import pytest
import trio
import trio.testing
from hostile_registry import (
    HostileRegistry,
    answered,
    cut,
    endless,
    flipped,
    hostile_registry,
    longer,
    other_body,
    redirected,
    shorter,
    stalled,
    trickling,
    with_headers,
    without_ranges,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from registry_client_rig import BRISK, DATA, HASTY, REPOSITORY, client_of, downloaded

from plugins.image_store.config import RegistryConfig
from plugins.image_store.registry.client import RegistryClient
from plugins.image_store.registry.credentials import Credentials
from plugins.image_store.registry.patience import Patience
from supervisor import DeadlineExceeded, FormatError, Refusal, RuntimeFailed, UnknownItem, Untrusted

SIZE = len(DATA)
PATH = f"/v2/{REPOSITORY}/blobs/"
WRONG_SIZE = "the blob must have the size that was given"


def ranges(registry: HostileRegistry) -> list[str | None]:
    return [request.headers.get("range") for request in registry.requests]


def sockets() -> int:
    names = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
    return sum(os.path.islink(name) and os.readlink(name).startswith("socket:") for name in names)


async def refused(
    registry: HostileRegistry, digest: str, *, size_bytes: int = SIZE, patience: Patience = HASTY
) -> Refusal:
    async with client_of(registry, patience=patience) as client:
        with pytest.raises(Refusal) as caught:
            await downloaded(client, digest, size_bytes=size_bytes)
    assert caught.value.item == f"{registry.name}{PATH}{digest}"
    return caught.value


async def test_a_blob_comes_in_small_chunks_over_one_request() -> None:
    async with hostile_registry() as registry:
        digest = registry.contents.add_blob(DATA)
        async with (
            client_of(registry) as client,
            client.download(REPOSITORY, digest, size_bytes=SIZE) as chunks,
        ):
            sizes = [len(chunk) async for chunk in chunks]
        assert sum(sizes) == SIZE
        assert 0 < min(sizes) <= max(sizes) <= 128 * 1024
        assert ranges(registry) == [None]


async def test_bytes_are_read_no_faster_than_they_are_asked_for() -> None:
    async with hostile_registry() as registry:
        digest = registry.contents.add_blob(bytes(64))
        registry.misbehave(other_body(bytes(64 << 20)))
        async with (
            client_of(registry) as client,
            client.download(REPOSITORY, digest, size_bytes=64 << 20) as chunks,
        ):
            first = await anext(chunks)
            await trio.sleep(0.2)
        # Left early: the connection is closed with the context, the rest was never sent.
        assert 0 < len(first) <= 128 * 1024


@pytest.mark.parametrize("at", [0, 1, 65_536, 500_000, SIZE - 1])
async def test_a_broken_transfer_goes_on_where_it_was(at: int) -> None:
    async with hostile_registry() as registry:
        digest = registry.contents.add_blob(DATA)
        registry.misbehave(cut(at), times=1)
        async with client_of(registry) as client:
            assert await downloaded(client, digest) == DATA
        assert ranges(registry) == [None, f"bytes={at}-" if at else None]


async def test_a_stalled_transfer_goes_on_where_it_was() -> None:
    async with hostile_registry() as registry:
        digest = registry.contents.add_blob(DATA)
        registry.misbehave(stalled(300_000), times=1)
        async with client_of(registry, patience=BRISK) as client:
            assert await downloaded(client, digest) == DATA
        assert ranges(registry) == [None, "bytes=300000-"]


async def test_a_transfer_may_break_as_often_as_it_goes_on() -> None:
    patience = msgspec.structs.replace(HASTY, progress_bytes=60_000)
    async with hostile_registry() as registry:
        digest = registry.contents.add_blob(DATA)
        registry.misbehave(cut(100_000))
        async with client_of(registry, patience=patience) as client:
            assert await downloaded(client, digest) == DATA
        assert len(registry.requests) == 11


async def test_attempts_that_bring_next_to_nothing_are_counted() -> None:
    async with hostile_registry() as registry:
        digest = registry.contents.add_blob(DATA)
        registry.misbehave(cut(1000))
        error = await refused(registry, digest)
        assert isinstance(error, RuntimeFailed)
        assert error.rule == "broke the connection"
        assert ranges(registry) == [None, "bytes=1000-", "bytes=2000-"]


async def test_a_registry_that_always_stalls_is_given_up() -> None:
    async with hostile_registry() as registry:
        digest = registry.contents.add_blob(DATA)
        registry.misbehave(stalled(0))
        error = await refused(registry, digest, patience=BRISK)
        assert isinstance(error, DeadlineExceeded)
        assert error.rule == "stopped answering"
        assert len(registry.requests) == HASTY.attempts


async def test_a_registry_that_sends_drops_is_given_up() -> None:
    async with hostile_registry() as registry:
        digest = registry.contents.add_blob(DATA)
        registry.misbehave(trickling(10, 0.05))
        error = await refused(registry, digest, patience=BRISK)
        assert isinstance(error, DeadlineExceeded)
        assert error.rule == "the registry must send at a bearable rate"
        assert error.expected == "65536 bytes within 0.4 s"
        assert len(registry.requests) == HASTY.attempts


async def test_the_time_that_the_reader_takes_does_not_count(
    autojump_clock: trio.testing.MockClock,
) -> None:
    autojump_clock.autojump_threshold = 0.05
    patience = Patience(slow_timeout_s=5, window_bytes=10 << 20)
    async with hostile_registry() as registry:
        digest = registry.contents.add_blob(DATA)
        got = bytearray()
        async with (
            RegistryClient(
                registry.name, registry.config, Credentials(), patience=patience
            ) as client,
            client.download(REPOSITORY, digest, size_bytes=SIZE) as chunks,
        ):
            async for chunk in chunks:
                got += chunk
                await trio.sleep(100)
        assert bytes(got) == DATA
        assert len(registry.requests) == 1


async def test_a_server_that_ignores_ranges_sends_all_again_and_no_byte_comes_twice() -> None:
    async with hostile_registry() as registry:
        digest = registry.contents.add_blob(DATA)
        registry.misbehave(without_ranges(registry.contents))
        registry.misbehave(cut(300_000), times=1)
        async with client_of(registry) as client:
            assert await downloaded(client, digest) == DATA
        assert ranges(registry) == [None, "bytes=300000-"]


async def test_a_server_that_refuses_ranges_is_asked_for_all_again() -> None:
    async with hostile_registry() as registry:
        digest = registry.contents.add_blob(DATA)
        registry.misbehave(without_ranges(registry.contents, status=416))
        registry.misbehave(cut(300_000), times=1)
        async with client_of(registry) as client:
            assert await downloaded(client, digest) == DATA
        assert ranges(registry) == [None, "bytes=300000-", None]


@pytest.mark.parametrize(
    "content_range",
    [
        f"bytes 0-{SIZE - 1}/{SIZE}",
        f"bytes 299999-{SIZE - 1}/{SIZE}",
        f"bytes 300000-{SIZE}/{SIZE + 1}",
        f"bytes 300000-{SIZE - 1}/{SIZE + 1}",
        f"bytes 300000-299999/{SIZE}",
        "bytes */5",
        "300000",
        "",
    ],
)
async def test_a_part_that_begins_elsewhere_is_refused(content_range: str) -> None:
    async with hostile_registry() as registry:
        digest = registry.contents.add_blob(DATA)
        registry.misbehave(cut(300_000), times=1)
        fault = registry.misbehave(with_headers(content_range=content_range))
        error = await refused(registry, digest)
        assert type(error) is Untrusted
        assert error.rule.startswith("a partial answer must begin where it was asked to")
        assert error.expected == f"bytes 300000-{SIZE - 1}/{SIZE}"
        assert error.actual == (content_range or "none")
        assert fault.times is None
        assert len(registry.requests) == 2


async def test_a_part_of_a_part_is_gone_on_from() -> None:
    async with hostile_registry() as registry:
        digest = registry.contents.add_blob(DATA)
        registry.misbehave(cut(300_000), times=1)
        registry.misbehave(with_headers(content_range=f"bytes 300000-399999/{SIZE}"), times=2)
        registry.misbehave(
            lambda request, reply: (
                msgspec.structs.replace(reply, body=reply.body[:100_000])
                if "range" in request.headers
                else reply
            ),
            times=2,
        )
        async with client_of(registry) as client:
            assert await downloaded(client, digest) == DATA
        assert ranges(registry) == [None, "bytes=300000-", "bytes=400000-"]


async def test_a_part_that_nobody_asked_for_is_refused() -> None:
    async with hostile_registry() as registry:
        digest = registry.contents.add_blob(DATA)
        registry.misbehave(
            lambda request, reply: msgspec.structs.replace(
                reply, status=206, headers={"content-range": f"bytes 0-{SIZE - 1}/{SIZE}"}
            )
        )
        error = await refused(registry, digest)
        assert type(error) is Untrusted
        assert error.expected == "status 200"


async def test_a_wrong_content_length_is_refused_before_a_byte_moves() -> None:
    async with hostile_registry() as registry:
        digest = registry.contents.add_blob(DATA)
        error = await refused(registry, digest, size_bytes=SIZE - 1)
        assert type(error) is Untrusted
        assert error.rule == WRONG_SIZE
        assert error.expected == f"{SIZE - 1} bytes"
        assert error.actual == f"{SIZE} bytes (Content-Length)"
        assert len(registry.requests) == 1


async def test_one_byte_too_many_ends_the_transfer() -> None:
    async with hostile_registry() as registry:
        digest = registry.contents.add_blob(DATA)
        registry.misbehave(longer(b"x", is_chunked=True))
        got = 0
        async with client_of(registry) as client:
            with pytest.raises(Untrusted) as caught:
                async with client.download(REPOSITORY, digest, size_bytes=SIZE) as chunks:
                    async for chunk in chunks:
                        got += len(chunk)
        assert got <= SIZE
        assert caught.value.rule == WRONG_SIZE
        assert caught.value.actual == f"more than {SIZE} bytes"
        assert len(registry.requests) == 1


async def test_an_endless_body_ends_at_the_size_that_was_given() -> None:
    async with hostile_registry() as registry:
        digest = registry.contents.add_blob(DATA)
        registry.misbehave(endless())
        error = await refused(registry, digest)
        assert type(error) is Untrusted
        assert error.actual == f"more than {SIZE} bytes"
        assert len(registry.requests) == 1


async def test_a_blob_that_is_really_shorter_is_refused_when_the_rest_is_asked_for() -> None:
    async with hostile_registry() as registry:
        digest = registry.contents.add_blob(DATA)
        registry.misbehave(
            lambda request, reply: msgspec.structs.replace(reply, is_chunked=True), times=1
        )
        error = await refused(registry, digest, size_bytes=SIZE + 5)
        assert type(error) is Untrusted
        assert error.rule == WRONG_SIZE
        assert error.actual == f"{SIZE} bytes"
        assert ranges(registry) == [None, f"bytes={SIZE}-"]


async def test_a_shorter_blob_without_ranges_is_refused_after_the_last_attempt() -> None:
    async with hostile_registry() as registry:
        digest = registry.contents.add_blob(DATA)
        registry.misbehave(without_ranges(registry.contents))
        registry.misbehave(shorter(10, is_chunked=True))
        error = await refused(registry, digest)
        assert type(error) is Untrusted
        assert error.actual == f"{SIZE - 10} bytes"
        assert len(registry.requests) == HASTY.attempts


async def test_wrong_bytes_are_for_the_reader_to_find() -> None:
    async with hostile_registry() as registry:
        digest = registry.contents.add_blob(DATA)
        registry.misbehave(flipped())
        registry.misbehave(with_headers(docker_content_digest=digest))
        async with client_of(registry) as client:
            got = await downloaded(client, digest)
        assert got != DATA
        assert got[1:] == DATA[1:]


async def test_an_encoded_blob_is_refused() -> None:
    async with hostile_registry() as registry:
        digest = registry.contents.add_blob(DATA)
        registry.misbehave(with_headers(content_encoding="gzip"))
        error = await refused(registry, digest)
        assert type(error) is Untrusted
        assert error.actual == "gzip"


async def test_an_absent_blob_is_asked_for_once() -> None:
    async with hostile_registry() as registry:
        digest = "sha256:" + "0" * 64
        error = await refused(registry, digest)
        assert type(error) is UnknownItem
        assert len(registry.requests) == 1


async def test_a_busy_registry_is_waited_for() -> None:
    async with hostile_registry() as registry:
        digest = registry.contents.add_blob(DATA)
        registry.misbehave(answered(503, retry_after="1"), times=2)
        async with client_of(registry) as client:
            assert await downloaded(client, digest) == DATA
        assert len(registry.requests) == 3


async def test_the_rest_comes_from_the_registry_when_a_mirror_breaks() -> None:
    async with hostile_registry() as registry, hostile_registry() as mirror:
        digest = registry.contents.add_blob(DATA)
        mirror.contents.add_blob(DATA)
        mirror.misbehave(cut(300_000), times=1)
        config = RegistryConfig(mirrors=(mirror.name,))
        async with client_of(registry, config=config) as client:
            mirror.misbehave(
                lambda request, reply: (
                    msgspec.structs.replace(reply, stop_at=0, then="close")
                    if "range" in request.headers
                    else reply
                )
            )
            assert await downloaded(client, digest) == DATA
        assert ranges(mirror) == [None, "bytes=300000-"]
        assert ranges(registry) == ["bytes=300000-"]


async def test_a_range_goes_along_with_a_redirect() -> None:
    async with hostile_registry() as registry, hostile_registry() as storage:
        digest = registry.contents.add_blob(DATA)
        storage.contents.add_blob(DATA)
        registry.misbehave(redirected(storage.url))
        storage.misbehave(cut(300_000), times=1)
        async with client_of(registry) as client:
            assert await downloaded(client, digest) == DATA
        assert ranges(storage) == [None, "bytes=300000-"]


async def test_a_blob_without_bytes_has_none() -> None:
    async with hostile_registry() as registry:
        digest = registry.contents.add_blob(b"")
        async with client_of(registry) as client:
            assert await downloaded(client, digest, size_bytes=0) == b""
        assert len(registry.requests) == 1


async def test_a_blob_without_bytes_is_not_there_because_nobody_answered() -> None:
    async with hostile_registry() as registry:
        digest = registry.contents.add_blob(b"")
        registry.misbehave(answered(503))
        assert isinstance(await refused(registry, digest, size_bytes=0), RuntimeFailed)
        assert len(registry.requests) == HASTY.attempts


async def test_a_bad_digest_is_refused_before_anything_is_sent() -> None:
    async with hostile_registry() as registry, client_of(registry) as client:
        with pytest.raises(FormatError):
            await downloaded(client, "sha256:../../x")
        assert registry.connections == 0


async def test_a_cancelled_download_leaves_no_connection() -> None:
    async with hostile_registry() as registry:
        digest = registry.contents.add_blob(DATA)
        registry.misbehave(stalled(100_000))
        before = sockets()
        async with client_of(registry) as client:
            with trio.move_on_after(0.2) as scope:
                await downloaded(client, digest)
            assert scope.cancelled_caught
            # The registry's half: it has not noticed yet.
            assert sockets() == before + 1


@settings(max_examples=25, deadline=None)
@given(
    breaks=st.lists(st.integers(0, 40_000), max_size=4),
    has_ranges=st.booleans(),
    is_chunked=st.booleans(),
)
def test_however_a_transfer_breaks_the_bytes_are_those_of_the_blob(
    breaks: list[int], has_ranges: bool, is_chunked: bool
) -> None:
    blob = DATA[:50_000]
    patience = msgspec.structs.replace(HASTY, attempts=6, first_pause_s=0.0)

    async def run() -> bytes:
        async with hostile_registry() as registry:
            digest = registry.contents.add_blob(blob)
            if not has_ranges:
                registry.misbehave(without_ranges(registry.contents))
            registry.misbehave(
                lambda request, reply: msgspec.structs.replace(reply, is_chunked=is_chunked)
            )
            left = iter(breaks)
            registry.misbehave(
                lambda request, reply: msgspec.structs.replace(
                    reply, stop_at=next(left), then="close"
                ),
                times=len(breaks),
            )
            async with client_of(registry, patience=patience) as client:
                return await downloaded(client, digest, size_bytes=len(blob))

    assert trio.run(run) == blob
