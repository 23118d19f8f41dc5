"""Layers from registries that lie, through the whole store: refused, and nothing is left."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio
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
from image_store_rig import (
    NOTHING,
    Rig,
    entry,
    expected_for,
    folder,
    make_tar,
    memory_files,
    running,
    verified,
)
from inflate_rig import children, pipes
from registry_client_rig import BRISK, HASTY
from tls_files import make_tls_files

from plugins.image_store.registry import client
from plugins.image_store.registry.patience import Patience
from supervisor import (
    Busy,
    DeadlineExceeded,
    Denied,
    DigestMismatch,
    FormatError,
    Refusal,
    RegistryBlob,
    RuntimeFailed,
    UnknownItem,
    Untrusted,
)

pytestmark = pytest.mark.root

# Random: compressed, it fills several megabytes and so every buffer on the way.
TAR = make_tar(folder("etc"), entry("etc/noise", random.Random(4).randbytes(3 << 20)))
BLOB = gzip.compress(TAR, compresslevel=1, mtime=0)
SIZE = len(BLOB)
OTHER = gzip.compress(make_tar(entry("evil", random.Random(5).randbytes(3 << 20))), 1, mtime=0)
EXPECTED = expected_for(TAR)
PATH = "/v2/team/app/blobs/sha256:" + hashlib.sha256(BLOB).hexdigest()
WRONG_SIZE = "the blob must have the size that was given"
Misbehave = Callable[[HostileRegistry], object]


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, HASTY)


def use(monkeypatch: pytest.MonkeyPatch, patience: Patience) -> None:
    monkeypatch.setattr(client, "Patience", lambda: patience)


@pytest.fixture(autouse=True)
def no_process_and_no_memory_left() -> Iterator[None]:
    before = children(), pipes(), memory_files()
    yield
    assert (children(), pipes(), memory_files()) == before


@asynccontextmanager
async def store_for(tmp_path: Path, *registries: HostileRegistry) -> AsyncIterator[Rig]:
    auth_file = tmp_path / "config.json"
    logins = {one.name: {"username": one.user, "password": one.password} for one in registries}
    auth_file.write_text(json.dumps({"auths": logins}))
    async with running(
        tmp_path,
        registries={one.name: msgspec.to_builtins(one.config) for one in registries},
        registry_auth_file=str(auth_file),
    ) as rig:
        yield rig


def source_at(registry: HostileRegistry, **fields: object) -> RegistryBlob:
    """The layer, which the registry has from now on."""
    source = RegistryBlob(
        registry=registry.name,
        repository="team/app",
        blob_digest=registry.contents.add_blob(BLOB),
        media_type="application/vnd.oci.image.layer.v1.tar+gzip",
        size_bytes=SIZE,
    )
    return msgspec.structs.replace(source, **fields)


async def refusal(rig: Rig, source: RegistryBlob) -> Refusal:
    """Of a fetch that must fail, and after which nothing is left."""
    with trio.fail_after(20):
        with pytest.raises(Refusal) as caught:
            await rig.store.fetch(EXPECTED, source)
    assert rig.leftovers() == NOTHING
    assert (memory_files(), children()) == (0, set())
    return caught.value


async def fetched(rig: Rig, source: RegistryBlob) -> None:
    """A fetch that must succeed; the layer is freed again."""
    with trio.fail_after(20):
        stored = await rig.store.fetch(EXPECTED, source)
        assert stored.computed["sha384"] == EXPECTED.hex
        assert stored.size_bytes == len(TAR)
        await rig.store.prepare(verified(stored))
        await rig.store.discard(stored)
    assert rig.leftovers() == NOTHING


async def test_an_honest_registry_is_believed_once_the_digests_are_right(tmp_path: Path) -> None:
    async with hostile_registry() as registry, store_for(tmp_path, registry) as rig:
        await fetched(rig, source_at(registry))


@pytest.mark.parametrize("demand", ["basic", "bearer"])
async def test_an_honest_registry_with_tls_and_logins_too(tmp_path: Path, demand: str) -> None:
    files = make_tls_files(tmp_path, "127.0.0.1")
    async with hostile_registry(tls=files) as registry, store_for(tmp_path, registry) as rig:
        registry.demand = "basic" if demand == "basic" else "bearer"
        await fetched(rig, source_at(registry))


LIES: dict[str, tuple[Misbehave, type[Refusal], str]] = {
    "wrong digest": (
        lambda r: r.misbehave(flipped()),
        DigestMismatch,
        "the blob's bytes must have the digest that names them",
    ),
    "another layer": (
        lambda r: r.misbehave(other_body(OTHER.ljust(SIZE, b"\0")[:SIZE])),
        DigestMismatch,
        "the blob's bytes must have the digest that names them",
    ),
    "wrong digest, vouched for": (
        lambda r: [
            r.misbehave(flipped()),
            r.misbehave(with_headers(docker_content_digest=PATH.rpartition("/")[2])),
        ],
        DigestMismatch,
        "the blob's bytes must have the digest that names them",
    ),
    "longer": (lambda r: r.misbehave(longer(b"x")), Untrusted, WRONG_SIZE),
    "longer, unsaid": (
        lambda r: r.misbehave(longer(b"x", is_chunked=True)),
        Untrusted,
        WRONG_SIZE,
    ),
    "shorter": (lambda r: r.misbehave(shorter(1)), Untrusted, WRONG_SIZE),
    "shorter, unsaid": (
        lambda r: [
            r.misbehave(without_ranges(r.contents)),
            r.misbehave(shorter(1, is_chunked=True)),
        ],
        Untrusted,
        WRONG_SIZE,
    ),
    "endless": (lambda r: r.misbehave(endless()), Untrusted, WRONG_SIZE),
    "always cut": (lambda r: r.misbehave(cut(1000)), RuntimeFailed, "broke the connection"),
    "always stalled": (
        lambda r: r.misbehave(stalled(1000)),
        DeadlineExceeded,
        "stopped answering",
    ),
    "in drops": (
        lambda r: r.misbehave(trickling(100, 0.05)),
        DeadlineExceeded,
        "the registry must send at a bearable rate",
    ),
    "a part of another place": (
        lambda r: [
            r.misbehave(cut(1 << 20), times=1),
            r.misbehave(with_headers(content_range=f"bytes 0-{SIZE - 1}/{SIZE}")),
        ],
        Untrusted,
        "a partial answer must begin where it was asked to (Content-Range)",
    ),
    "the rest of another blob": (
        lambda r: [
            r.misbehave(cut(1 << 20), times=1),
            r.misbehave(
                lambda request, reply: (
                    msgspec.structs.replace(reply, body=bytes(len(reply.body)))
                    if "range" in request.headers
                    else reply
                )
            ),
        ],
        DigestMismatch,
        "the blob's bytes must have the digest that names them",
    ),
    "redirects without end": (
        lambda r: r.misbehave(redirected(r.url)),
        Untrusted,
        "at most 5 redirects are followed",
    ),
    "a redirect to no address": (
        lambda r: r.misbehave(redirected("file:///etc/passwd")),
        FormatError,
        "must be an http or https URL",
    ),
    "huge headers": (
        lambda r: r.misbehave(with_headers(x_flood="a" * 200_000)),
        Untrusted,
        "an answer's headers have a bounded size",
    ),
    "encoded": (
        lambda r: r.misbehave(with_headers(content_encoding="gzip")),
        Untrusted,
        "a registry must send bodies as they are (Content-Encoding)",
    ),
    "429 for ever": (
        lambda r: r.misbehave(answered(429)),
        Busy,
        "the registry asks for fewer requests",
    ),
    "500 for ever": (lambda r: r.misbehave(answered(500)), RuntimeFailed, "the registry failed"),
    "absent": (lambda r: r.contents.blobs.clear(), UnknownItem, "the registry does not have it"),
    "closed to us": (
        lambda r: r.misbehave(answered(403)),
        Denied,
        "the registry does not allow it",
    ),
}


@pytest.mark.parametrize("lie", list(LIES))
async def test_a_lie_is_refused_and_the_truth_is_taken_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    misbehave, kind, rule = LIES[lie]
    if kind is DeadlineExceeded:
        use(monkeypatch, BRISK)
    async with hostile_registry() as registry, store_for(tmp_path, registry) as rig:
        source = source_at(registry)
        misbehave(registry)
        error = await refusal(rig, source)
        assert (type(error), error.rule) == (kind, rule)
        registry.behave()
        use(monkeypatch, HASTY)
        await fetched(rig, source_at(registry))


@pytest.mark.parametrize(
    "misbehave",
    [
        lambda r: r.misbehave(cut(1 << 20), times=2),
        lambda r: r.misbehave(stalled(1 << 20), times=1),
        lambda r: r.misbehave(answered(503, retry_after="86400"), times=2),
        lambda r: [r.misbehave(without_ranges(r.contents)), r.misbehave(cut(1 << 20), times=1)],
        lambda r: [
            r.misbehave(without_ranges(r.contents, status=416)),
            r.misbehave(cut(1 << 20), times=1),
        ],
    ],
)
async def test_what_only_fails_for_a_while_is_got_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, misbehave: Misbehave
) -> None:
    async with hostile_registry() as registry, store_for(tmp_path, registry) as rig:
        source = source_at(registry)
        misbehave(registry)
        use(monkeypatch, BRISK)
        await fetched(rig, source)


async def test_a_redirect_to_another_host_takes_no_login_along(tmp_path: Path) -> None:
    async with (
        hostile_registry() as registry,
        hostile_registry() as elsewhere,
        store_for(tmp_path, registry) as rig,
    ):
        registry.demand = "basic"
        source = source_at(registry)
        elsewhere.contents.add_blob(BLOB)
        registry.misbehave(redirected(elsewhere.url))
        await fetched(rig, source)
        assert registry.logins == [None, registry.basic]
        assert elsewhere.logins == [None]
        elsewhere.misbehave(flipped())
        error = await refusal(rig, source)
        assert type(error) is DigestMismatch
        assert elsewhere.logins == [None, None]


async def test_a_redirect_to_plain_http_is_not_followed(tmp_path: Path) -> None:
    files = make_tls_files(tmp_path, "127.0.0.1")
    async with (
        hostile_registry(tls=files) as registry,
        hostile_registry() as elsewhere,
        store_for(tmp_path, registry) as rig,
    ):
        source = source_at(registry)
        elsewhere.contents.add_blob(BLOB)
        registry.misbehave(redirected(elsewhere.url))
        error = await refusal(rig, source)
        assert type(error) is Untrusted
        assert error.rule == "a redirect must not lead from TLS to plain HTTP"
        assert (error.expected, error.actual) == (f"https, from {registry.url}", elsewhere.url)
        assert elsewhere.requests == []


async def test_a_blob_that_is_right_but_not_the_layer_is_told_by_its_computed_digest(
    tmp_path: Path,
) -> None:
    async with hostile_registry() as registry, store_for(tmp_path, registry) as rig:
        digest = registry.contents.add_blob(OTHER)
        source = source_at(registry, blob_digest=digest, size_bytes=len(OTHER))
        stored = await rig.store.fetch(EXPECTED, source)
        assert stored.computed["sha384"] != EXPECTED.hex
        assert stored.computed["sha384"] == expected_for(gzip.decompress(OTHER)).hex
        await rig.store.discard(stored)
        assert rig.leftovers() == NOTHING


async def test_a_registry_that_nobody_configured_is_not_connected_to(tmp_path: Path) -> None:
    async with hostile_registry() as registry, store_for(tmp_path) as rig:
        error = await refusal(rig, source_at(registry))
        assert type(error) is Denied
        assert registry.connections == 0


async def test_a_fetch_cancelled_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    async with hostile_registry() as registry, store_for(tmp_path, registry) as rig:
        source = source_at(registry)
        registry.misbehave(stalled(2 << 20))
        with trio.move_on_after(0.3) as scope:
            await rig.store.fetch(EXPECTED, source)
        assert scope.cancelled_caught
        assert rig.leftovers() == NOTHING
        assert (memory_files(), children()) == (0, set())
