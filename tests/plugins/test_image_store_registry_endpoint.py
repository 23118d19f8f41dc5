"""Redirects and locations: where a registry may send us, and what goes along."""

from __future__ import annotations

from pathlib import Path

import pytest
from hostile_registry import hostile_registry, redirected, with_headers
from registry_client_rig import DATA, REPOSITORY, client_of, downloaded, logins
from tls_files import make_tls_files

from plugins.image_store.config import RegistryConfig
from plugins.image_store.registry.endpoint import MAX_REDIRECTS, speaks_plainly
from supervisor import FormatError, Untrusted

TAGS = f"/v2/{REPOSITORY}/tags/list"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_blob_elsewhere_is_fetched_without_the_login(tmp_path: Path, status: int) -> None:
    async with hostile_registry() as registry, hostile_registry() as storage:
        registry.demand = "basic"
        digest = registry.contents.add_blob(DATA)
        storage.contents.add_blob(DATA)
        registry.misbehave(redirected(storage.url, status=status))
        credentials = logins(tmp_path / "config.json", registry)
        async with client_of(registry, credentials=credentials) as client:
            assert await downloaded(client, digest) == DATA
        assert storage.logins == [None]
        assert registry.logins == [None, registry.basic]


async def test_a_redirect_within_the_registry_keeps_the_login(tmp_path: Path) -> None:
    async with hostile_registry() as registry:
        registry.demand = "basic"
        digest = registry.contents.add_blob(DATA)
        registry.misbehave(redirected(f"/v2/other/blobs/{digest}"), on=REPOSITORY)
        credentials = logins(tmp_path / "config.json", registry)
        async with client_of(registry, credentials=credentials) as client:
            assert await downloaded(client, digest) == DATA
        assert registry.logins == [None, registry.basic, registry.basic]


async def test_a_redirect_from_tls_to_plain_http_is_refused_and_both_hosts_are_named(
    tmp_path: Path,
) -> None:
    files = make_tls_files(tmp_path, "127.0.0.1")
    async with hostile_registry(tls=files) as registry, hostile_registry() as storage:
        digest = registry.contents.add_blob(DATA)
        storage.contents.add_blob(DATA)
        registry.misbehave(redirected(storage.url))
        async with client_of(registry) as client:
            with pytest.raises(Untrusted) as caught:
                await downloaded(client, digest)
        assert caught.value.rule == "a redirect must not lead from TLS to plain HTTP"
        assert caught.value.expected == f"https, from {registry.url}"
        assert caught.value.actual == storage.url
        assert storage.requests == []


async def test_each_redirect_is_judged_from_where_it_comes(tmp_path: Path) -> None:
    """Though the registry itself is spoken to plainly, what it leads to by TLS stays so."""
    files = make_tls_files(tmp_path, "127.0.0.1")
    async with hostile_registry() as registry, hostile_registry(tls=files) as storage:
        digest = registry.contents.add_blob(DATA)
        registry.misbehave(redirected(storage.url), times=1)
        storage.misbehave(redirected(registry.url))
        config = RegistryConfig(plain_http=True, ca_file=str(files.certificate))
        async with client_of(registry, config=config) as client:
            with pytest.raises(Untrusted) as caught:
                await downloaded(client, digest)
        assert caught.value.rule == "a redirect must not lead from TLS to plain HTTP"
        assert caught.value.expected == f"https, from {storage.url}"
        assert len(registry.requests) == 1


async def test_a_loop_of_redirects_ends(tmp_path: Path) -> None:
    async with hostile_registry() as registry, hostile_registry() as other:
        digest = registry.contents.add_blob(DATA)
        registry.misbehave(redirected(other.url))
        other.misbehave(redirected(registry.url))
        async with client_of(registry) as client:
            with pytest.raises(Untrusted) as caught:
                await downloaded(client, digest)
        assert caught.value.rule == "at most 5 redirects are followed"
        assert {registry.url, other.url} == {
            str(caught.value.expected).removeprefix("an answer from "),
            str(caught.value.actual).removeprefix("another redirect to "),
        }
        assert len(registry.requests) + len(other.requests) == MAX_REDIRECTS + 1


async def test_as_many_redirects_as_allowed_are_followed() -> None:
    async with hostile_registry() as registry:
        registry.misbehave(redirected(TAGS), on="/tags/", times=MAX_REDIRECTS)
        async with client_of(registry) as client:
            answer = await client.call("GET", TAGS, repository=REPOSITORY)
        assert answer.status == 200
        assert len(registry.requests) == MAX_REDIRECTS + 1


@pytest.mark.parametrize(
    "location",
    ["ftp://127.0.0.1/x", "http://u:secret-word@127.0.0.1/", "http://127.1/", "http://["],
)
async def test_locations_that_are_no_address_are_refused(location: str) -> None:
    async with hostile_registry() as registry:
        registry.misbehave(redirected(location), on="/tags/")
        async with client_of(registry) as client:
            with pytest.raises(FormatError) as caught:
                await client.call("GET", TAGS, repository=REPOSITORY)
        assert caught.value.item == f"{registry.name}{TAGS}"
        assert "secret-word" not in str(caught.value)


async def test_only_reading_requests_follow_redirects() -> None:
    async with hostile_registry() as registry, hostile_registry() as other:
        registry.misbehave(redirected(other.url), on="/uploads/", method="POST")
        async with client_of(registry) as client:
            with pytest.raises(Untrusted) as caught:
                await client.call("POST", f"/v2/{REPOSITORY}/blobs/uploads/", repository=REPOSITORY)
        assert caught.value.rule == "a redirect is followed for GET and HEAD alone"
        assert caught.value.actual == f"POST redirected to {other.url}"
        assert other.requests == []


async def test_a_location_elsewhere_sees_no_login(tmp_path: Path) -> None:
    async with hostile_registry() as registry, hostile_registry() as storage:
        registry.demand = "basic"
        uploads = f"/v2/{REPOSITORY}/blobs/uploads/"
        registry.misbehave(with_headers(location=f"{storage.url}{uploads}"), on=uploads, method="")
        credentials = logins(tmp_path / "config.json", registry)
        async with client_of(registry, credentials=credentials) as client:
            began = await client.call(
                "POST",
                uploads,
                repository=REPOSITORY,
                actions="pull,push",
                statuses=frozenset({202}),
            )
            await client.call(
                "POST",
                began.headers["location"],
                repository=REPOSITORY,
                actions="pull,push",
                statuses=frozenset({202}),
            )
        assert storage.logins == [None]


async def test_a_location_over_plain_http_after_tls_is_refused(tmp_path: Path) -> None:
    files = make_tls_files(tmp_path, "127.0.0.1")
    async with hostile_registry(tls=files) as registry, hostile_registry() as storage:
        async with client_of(registry) as client:
            with pytest.raises(Untrusted, match="a location must not lead from TLS to plain HTTP"):
                await client.call("PUT", f"{storage.url}/x", repository=REPOSITORY)
        assert storage.requests == []


@pytest.mark.parametrize("path", ["/", "/token", "v2/", "//127.0.0.1/v2/", "/v1/x", "ftp://x/"])
async def test_only_the_api_is_asked(path: str) -> None:
    async with hostile_registry() as registry:
        async with client_of(registry) as client:
            with pytest.raises(FormatError, match="a request's path begins with /v2/"):
                await client.call("GET", path, repository=REPOSITORY)
        assert registry.requests == []


@pytest.mark.parametrize(
    ("registry", "config", "plainly"),
    [
        ("127.0.0.1:5000", RegistryConfig(), True),
        ("localhost", RegistryConfig(), True),
        ("[::1]:5000", RegistryConfig(), True),
        ("127.0.0.1:5000", RegistryConfig(ca_file="ca.pem"), False),
        ("registry.example.org", RegistryConfig(), False),
        ("registry.example.org:80", RegistryConfig(), False),
        ("registry.example.org", RegistryConfig(plain_http=True), True),
        ("docker.io", RegistryConfig(), False),
    ],
)
def test_plain_http_is_spoken_to_loopback_and_where_the_table_says_so(
    registry: str, config: RegistryConfig, plainly: bool
) -> None:
    assert speaks_plainly(registry, config) is plainly
