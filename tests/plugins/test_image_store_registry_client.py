"""Calls: bounds, retries, what errors say, mirrors, TLS."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing
from honest_registry import OCI_MANIFEST, digest_name
from hostile_registry import (
    HostileRegistry,
    answered,
    cut,
    endless,
    hostile_registry,
    other_body,
    stalled,
    trickling,
    with_headers,
)
from registry_client_rig import BRISK, DATA, HASTY, REPOSITORY, client_of, downloaded, logins
from tls_files import make_tls_files

from plugins.image_store.config import RegistryConfig
from plugins.image_store.registry.client import RegistryAnswer, RegistryClient
from plugins.image_store.registry.credentials import Credentials
from plugins.image_store.registry.patience import Patience
from supervisor import (
    Busy,
    ConfigError,
    DeadlineExceeded,
    Denied,
    FormatError,
    Refusal,
    RuntimeFailed,
    UnknownItem,
    Untrusted,
)

MANIFEST = f"/v2/{REPOSITORY}/manifests/1"


async def manifest(client: RegistryClient, *, max_bytes: int = 1000) -> RegistryAnswer:
    return await client.call("GET", MANIFEST, repository=REPOSITORY, max_bytes=max_bytes)


def fill(registry: HostileRegistry, body: bytes = b'{"config":{}}') -> bytes:
    registry.contents.add_manifest(REPOSITORY, body, tag="1")
    return body


async def test_an_answer_is_its_status_headers_and_body() -> None:
    async with hostile_registry() as registry:
        body = fill(registry)
        async with client_of(registry) as client:
            answer = await client.call(
                "GET", MANIFEST, repository=REPOSITORY, headers={"accept": OCI_MANIFEST}
            )
        assert (answer.status, answer.body) == (200, body)
        assert answer.headers["content-type"] == OCI_MANIFEST
        [seen] = registry.requests
        assert seen.headers == {
            "host": registry.name,
            "user-agent": "attested-containers",
            "accept-encoding": "identity",
            "accept": OCI_MANIFEST,
        }


async def test_head_has_no_body() -> None:
    async with hostile_registry() as registry:
        body = fill(registry)
        async with client_of(registry) as client:
            answer = await client.call("HEAD", MANIFEST, repository=REPOSITORY)
        assert answer.body == b""
        assert answer.headers["content-length"] == str(len(body))


async def test_a_blob_and_a_manifest_are_pushed() -> None:
    async with hostile_registry() as registry:
        created, begun = frozenset({201}), frozenset({202})
        async with client_of(registry) as client:

            async def push(
                method: str, path: str, statuses: frozenset[int], content: bytes | None = None
            ) -> RegistryAnswer:
                return await client.call(
                    method,
                    path,
                    repository=REPOSITORY,
                    actions="pull,push",
                    content=content,
                    statuses=statuses,
                )

            upload = await push("POST", f"/v2/{REPOSITORY}/blobs/uploads/", begun)
            patched = await push("PATCH", upload.headers["location"], begun, b"half ")
            location = f"{patched.headers['location']}&digest={digest_name(b'half done')}"
            done = await push("PUT", location, created, b"done")
            assert done.headers["location"].startswith(f"{registry.url}/v2/{REPOSITORY}/blobs/")
            await push("PUT", MANIFEST, created, b'{"config":{}}')
        assert registry.contents.blobs == {digest_name(b"half done"): b"half done"}
        assert registry.contents.manifest(REPOSITORY, "1") is not None


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_body_beyond_its_bound_is_refused(is_chunked: bool) -> None:
    async with hostile_registry() as registry:
        fill(registry, b" " * 5_000_000)
        if is_chunked:
            registry.misbehave(endless(), on="/manifests/")
        async with client_of(registry) as client:
            with pytest.raises(Untrusted) as caught:
                await manifest(client, max_bytes=100_000)
        assert caught.value.item == f"{registry.name}{MANIFEST}"
        assert caught.value.expected == "at most 100000 bytes"
        assert len(registry.requests) == 1


async def test_a_body_as_large_as_its_bound_is_taken() -> None:
    async with hostile_registry() as registry:
        body = fill(registry, b" " * 1000)
        async with client_of(registry) as client:
            assert (await manifest(client, max_bytes=1000)).body == body


async def test_headers_without_bound_are_refused_at_once() -> None:
    async with hostile_registry() as registry:
        fill(registry)
        registry.misbehave(with_headers(x_flood="a" * 300_000), on="/manifests/")
        async with client_of(registry) as client:
            with pytest.raises(Untrusted, match="an answer's headers have a bounded size"):
                await manifest(client)
        assert len(registry.requests) == 1


async def test_an_encoded_body_is_refused() -> None:
    async with hostile_registry() as registry:
        fill(registry)
        registry.misbehave(with_headers(content_encoding="gzip"), on="/manifests/")
        async with client_of(registry) as client:
            with pytest.raises(Untrusted) as caught:
                await manifest(client)
        assert (caught.value.expected, caught.value.actual) == ("identity", "gzip")


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
async def test_what_may_pass_is_asked_again(status: int) -> None:
    async with hostile_registry() as registry:
        body = fill(registry)
        registry.misbehave(answered(status), on="/manifests/", times=2)
        async with client_of(registry) as client:
            assert (await manifest(client)).body == body
        assert len(registry.requests) == 3


@pytest.mark.parametrize(
    ("status", "kind", "attempts"),
    [
        (400, Untrusted, 1),
        (403, Denied, 1),
        (404, UnknownItem, 1),
        (405, Untrusted, 1),
        (408, RuntimeFailed, 3),
        (429, Busy, 3),
        (500, RuntimeFailed, 3),
        (501, RuntimeFailed, 1),
        (503, RuntimeFailed, 3),
    ],
)
async def test_what_does_not_pass_is_refused_with_the_registrys_own_words(
    status: int, kind: type[Refusal], attempts: int
) -> None:
    async with hostile_registry() as registry:
        registry.misbehave(answered(status, "CODE", "some words\n\u202e"), on="/manifests/")
        async with client_of(registry) as client:
            with pytest.raises(Refusal) as caught:
                await manifest(client)
        assert type(caught.value) is kind
        assert caught.value.item == f"{registry.name}{MANIFEST}"
        assert caught.value.actual == f"{status} (CODE: some words??)"
        assert len(registry.requests) == attempts


@pytest.mark.parametrize(
    "body",
    [b"<html>", b"\xff\xfe", b'{"errors": 1}', b"[" * 16_000, b'{"errors": []}', b""],
)
async def test_errors_without_words_are_refused_by_their_status(body: bytes) -> None:
    async with hostile_registry() as registry:
        registry.misbehave(answered(404), on="/manifests/")
        registry.misbehave(other_body(body), on="/manifests/")
        async with client_of(registry) as client:
            with pytest.raises(UnknownItem) as caught:
                await manifest(client)
        assert caught.value.actual == "404"


async def test_a_registrys_words_are_bounded() -> None:
    async with hostile_registry() as registry:
        registry.misbehave(answered(404, "C", "x" * 10_000), on="/manifests/")
        async with client_of(registry) as client:
            with pytest.raises(UnknownItem) as caught:
                await manifest(client)
        assert len(str(caught.value.actual)) == 300


async def test_an_accepted_status_is_an_answer() -> None:
    async with hostile_registry() as registry:
        registry.contents.referrers_api = False
        path = f"/v2/{REPOSITORY}/referrers/sha256:{'0' * 64}"
        async with client_of(registry) as client:
            answer = await client.call(
                "GET", path, repository=REPOSITORY, statuses=frozenset({200, 404})
            )
        assert answer.status == 404


async def test_a_retry_after_is_kept_to_within_bounds(
    autojump_clock: trio.testing.MockClock,
) -> None:
    autojump_clock.autojump_threshold = 0.05
    async with hostile_registry() as registry:
        fill(registry)
        registry.misbehave(answered(429, retry_after="7"), on="/manifests/", times=1)
        async with RegistryClient(registry.name, registry.config, Credentials()) as client:
            began_s = trio.current_time()
            await manifest(client)
            assert 7 <= trio.current_time() - began_s < 8
            registry.misbehave(answered(503, retry_after="86400"), on="/manifests/", times=1)
            began_s = trio.current_time()
            await manifest(client)
            longest_s = Patience().longest_pause_s
            assert longest_s <= trio.current_time() - began_s < longest_s + 1


async def test_pauses_grow_between_attempts(autojump_clock: trio.testing.MockClock) -> None:
    autojump_clock.autojump_threshold = 0.05
    patience = Patience()
    async with hostile_registry() as registry:
        registry.misbehave(answered(500), on="/manifests/")
        async with RegistryClient(registry.name, registry.config, Credentials()) as client:
            began_s = trio.current_time()
            with pytest.raises(RuntimeFailed):
                await manifest(client)
            took_s = trio.current_time() - began_s
        assert len(registry.requests) == patience.attempts == 5
        doubled_s = patience.first_pause_s * (1 + 2 + 4 + 8)
        assert doubled_s / 2 <= took_s <= doubled_s + 1


async def test_a_broken_or_stalled_answer_is_asked_for_again() -> None:
    async with hostile_registry() as registry:
        body = fill(registry)
        registry.misbehave(cut(3), on="/manifests/", times=1)
        async with client_of(registry, patience=BRISK) as client:
            assert (await manifest(client)).body == body
            registry.behave()
            registry.misbehave(stalled(3), on="/manifests/", times=1)
            assert (await manifest(client)).body == body


async def test_an_answer_in_drops_ends_with_its_attempts() -> None:
    patience = msgspec.structs.replace(HASTY, answer_timeout_s=0.3, attempts=2)
    async with hostile_registry() as registry:
        fill(registry, b" " * 900)
        registry.misbehave(trickling(1, 0.05), on="/manifests/")
        async with client_of(registry, patience=patience) as client:
            with pytest.raises(DeadlineExceeded) as caught:
                await manifest(client)
        assert caught.value.expected == "within 0.3 s"
        assert len(registry.requests) == 2


async def test_a_registry_that_is_not_there_is_named() -> None:
    async with hostile_registry() as registry:
        pass
    async with client_of(registry) as client:
        with pytest.raises(RuntimeFailed) as caught:
            await manifest(client)
    assert caught.value.rule == "could not be connected to"
    assert str(caught.value.actual).startswith(registry.url)


async def test_what_is_not_http_is_refused_without_its_words() -> None:
    async def babble(stream: trio.SocketStream) -> None:
        await stream.receive_some(1000)
        await stream.send_all(b"secret-word of another protocol\r\n\r\n")

    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_tcp, babble, 0, host="127.0.0.1"))
        name = f"127.0.0.1:{listener.socket.getsockname()[1]}"
        async with RegistryClient(name, RegistryConfig(), Credentials(), patience=HASTY) as client:
            with pytest.raises(RuntimeFailed) as caught:
                await manifest(client)
        nursery.cancel_scope.cancel()
    assert caught.value.rule == "broke the connection"
    assert "secret-word" not in str(caught.value)


async def test_a_post_that_may_have_been_done_is_not_repeated() -> None:
    path = f"/v2/{REPOSITORY}/blobs/uploads/"
    begun = frozenset({202})
    async with hostile_registry() as registry, client_of(registry) as client:
        fault = registry.misbehave(answered(500), on="/uploads/", method="POST")
        with pytest.raises(RuntimeFailed):
            await client.call("POST", path, repository=REPOSITORY, statuses=begun)
        assert len(registry.requests) == 1
        fault.change, fault.times = answered(503), 1
        await client.call("POST", path, repository=REPOSITORY, statuses=begun)
        assert len(registry.requests) == 3


@pytest.mark.parametrize("repository", ["", "../x", "Team/app", "a?b"])
async def test_a_bad_repository_is_refused_before_anything_is_sent(repository: str) -> None:
    async with hostile_registry() as registry, client_of(registry) as client:
        with pytest.raises(FormatError, match="repository's name"):
            await client.call("GET", MANIFEST, repository=repository)
        assert registry.connections == 0


def test_a_bad_registry_is_refused_at_once() -> None:
    with pytest.raises(FormatError, match="a registry is HOST or HOST:PORT"):
        RegistryClient("https://registry.example.org", RegistryConfig(), Credentials())
    with pytest.raises(FormatError) as caught:
        RegistryClient("registry.example.org", RegistryConfig(mirrors=("a/b",)), Credentials())
    assert caught.value.item == "mirrors"


# --- TLS --------------------------------------------------------------------------------------


async def test_a_registry_with_its_own_ca_is_spoken_to_by_tls(tmp_path: Path) -> None:
    async with hostile_registry(tls=make_tls_files(tmp_path, "127.0.0.1")) as registry:
        body = fill(registry)
        async with client_of(registry) as client:
            assert (await manifest(client)).body == body


async def test_a_certificate_from_another_ca_or_for_another_name_is_refused_at_once(
    tmp_path: Path,
) -> None:
    for folder in ("right", "other", "elsewhere"):
        (tmp_path / folder).mkdir()
    other = make_tls_files(tmp_path / "other", "127.0.0.1")
    for files, ca_file in (
        (make_tls_files(tmp_path / "right", "127.0.0.1"), other.certificate),
        (make_tls_files(tmp_path / "elsewhere", "127.0.0.9"), None),
    ):
        async with hostile_registry(tls=files) as registry:
            config = RegistryConfig(ca_file=str(ca_file or files.certificate))
            async with client_of(registry, config=config) as client:
                with pytest.raises(Untrusted) as caught:
                    await manifest(client)
            assert caught.value.rule.startswith("the server's certificate must be for its name")
            assert registry.requests == []
            assert registry.connections <= 1


async def test_a_ca_file_that_holds_no_certificates_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("nothing")
    for name in ("empty.pem", "absent.pem"):
        config = RegistryConfig(ca_file=str(tmp_path / name))
        with pytest.raises(ConfigError) as caught:
            async with RegistryClient("registry.example.org", config, Credentials()):
                raise AssertionError("entered without roots")
        assert caught.value.item == str(tmp_path / name)


async def test_the_environments_proxies_and_roots_mean_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login x password secret-word\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    async with hostile_registry() as registry:
        fill(registry)
        async with client_of(registry) as client:
            await manifest(client)
        assert registry.logins == [None]


# --- mirrors ----------------------------------------------------------------------------------


async def test_mirrors_are_asked_first_in_order_and_each_with_its_own_login(
    tmp_path: Path,
) -> None:
    async with (
        hostile_registry() as registry,
        hostile_registry() as first,
        hostile_registry() as second,
    ):
        for one in (first, second):
            one.demand = "basic"
            one.password = f"secret-of-{one.name}"
        body = fill(second)
        config = RegistryConfig(mirrors=(first.name, second.name))
        credentials = logins(tmp_path / "config.json", registry, first, second)
        async with client_of(registry, config=config, credentials=credentials) as client:
            assert (await manifest(client)).body == body
        assert first.logins == [None, first.basic]
        assert second.logins == [None, second.basic]
        assert registry.requests == []


async def test_the_registry_itself_answers_when_no_mirror_does() -> None:
    async with (
        hostile_registry() as registry,
        hostile_registry() as first,
        hostile_registry() as second,
    ):
        body = fill(registry)
        first.misbehave(answered(500), on="/manifests/")
        config = RegistryConfig(mirrors=(first.name, second.name))
        async with client_of(registry, config=config) as client:
            assert (await manifest(client)).body == body
        assert len(first.requests) == HASTY.mirror_attempts
        assert len(second.requests) == 1


async def test_a_failure_tells_of_the_mirrors_too() -> None:
    async with hostile_registry() as registry, hostile_registry() as mirror:
        mirror.misbehave(answered(403, "DENIED"), on="/manifests/")
        config = RegistryConfig(mirrors=(mirror.name,))
        async with client_of(registry, config=config) as client:
            with pytest.raises(UnknownItem) as caught:
                await manifest(client)
        assert caught.value.item == f"{registry.name}{MANIFEST}"
        assert caught.value.actual == (
            "404 (MANIFEST_UNKNOWN: 1); mirrors before it: "
            f"{mirror.name}{MANIFEST}: the registry does not allow it; got 403 (DENIED)"
        )


async def test_a_mirrors_no_is_not_the_registrys() -> None:
    async with hostile_registry() as registry, hostile_registry() as mirror:
        fill(registry)
        config = RegistryConfig(mirrors=(mirror.name,))
        async with client_of(registry, config=config) as client:
            answer = await client.call(
                "GET", MANIFEST, repository=REPOSITORY, statuses=frozenset({200, 404})
            )
        assert answer.status == 200


async def test_nothing_is_pushed_to_a_mirror() -> None:
    async with hostile_registry() as registry, hostile_registry() as mirror:
        config = RegistryConfig(mirrors=(mirror.name,))
        async with client_of(registry, config=config) as client:
            await client.call(
                "PUT",
                MANIFEST,
                repository=REPOSITORY,
                actions="pull,push",
                content=b'{"config":{}}',
                statuses=frozenset({201}),
            )
        assert mirror.requests == []


async def test_a_mirror_is_reached_as_its_own_table_says(tmp_path: Path) -> None:
    files = make_tls_files(tmp_path, "127.0.0.1")
    async with hostile_registry() as registry, hostile_registry(tls=files) as mirror:
        digest = mirror.contents.add_blob(DATA)
        config = RegistryConfig(mirrors=(mirror.name,))
        tables = {registry.name: config, mirror.name: mirror.config}
        async with client_of(registry, config=config, registries=tables) as client:
            assert await downloaded(client, digest) == DATA
        assert registry.requests == []
