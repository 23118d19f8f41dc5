"""Who a registry is told we are, and who else is told nothing."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import pytest
import trio
from honest_registry import Reply, Request
from hostile_registry import (
    Change,
    HostileRegistry,
    answered,
    hostile_registry,
    other_body,
    redirected,
)
from registry_client_rig import DATA, REPOSITORY, client_of, downloaded, logins
from tls_files import make_tls_files

from plugins.image_store.registry.client import RegistryClient
from plugins.image_store.registry.credentials import load_credentials
from supervisor import Busy, Denied, Refusal, Untrusted
from supervisor.formats.errors import FormatError

TAGS = f"/v2/{REPOSITORY}/tags/list"


async def tags(client: RegistryClient, *, actions: str = "pull") -> int:
    answer = await client.call("GET", TAGS, repository=REPOSITORY, actions=actions)
    return answer.status


def demanding(text: str) -> dict[str, str]:
    return {"www_authenticate": text}


async def test_basic_is_given_when_it_is_demanded_and_kept(tmp_path: Path) -> None:
    async with hostile_registry() as registry:
        registry.demand = "basic"
        credentials = logins(tmp_path / "config.json", registry)
        async with client_of(registry, credentials=credentials) as client:
            assert await tags(client) == 200
            assert await tags(client) == 200
        assert registry.logins == [None, registry.basic, registry.basic]


async def test_basic_without_a_login_is_denied_with_the_files_name(tmp_path: Path) -> None:
    async with hostile_registry() as registry, hostile_registry() as other:
        registry.demand = "basic"
        credentials = logins(tmp_path / "config.json", other)
        async with client_of(registry, credentials=credentials) as client:
            with pytest.raises(Denied) as caught:
                await tags(client)
        assert caught.value.rule == "the registry demands a login"
        assert caught.value.actual == f"none for it in {tmp_path / 'config.json'}"
        assert registry.logins == [None]


async def test_a_wrong_login_is_denied_after_one_try(tmp_path: Path) -> None:
    async with hostile_registry() as registry:
        registry.demand = "basic"
        credentials = logins(tmp_path / "config.json", registry)
        registry.password = "changed-since"
        async with client_of(registry, credentials=credentials) as client:
            with pytest.raises(Denied, match="does not allow it; got 401 \\(UNAUTHORIZED\\)"):
                await tags(client)
        assert len(registry.requests) == 2


async def test_a_token_is_fetched_once_per_scope_until_it_expires(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    autojump_clock.autojump_threshold = 0.05
    async with hostile_registry() as registry:
        registry.demand = "bearer"
        registry.token_lifetime_s = 300
        credentials = logins(tmp_path / "config.json", registry)
        async with RegistryClient(registry.name, registry.config, credentials) as client:
            await tags(client)
            await tags(client)
            await tags(client, actions="pull,push")
            assert list(registry.tokens.values()) == [
                f"repository:{REPOSITORY}:pull",
                f"repository:{REPOSITORY}:pull,push",
            ]
            await trio.sleep(280)
            await tags(client)
            assert len(registry.tokens) == 2
            await trio.sleep(20)
            await tags(client)
            assert len(registry.tokens) == 3
        asked = [one for one in registry.requests if one.path == "/token"]
        assert {one.query["service"] for one in asked} == {registry.name}
        assert {one.authorization for one in asked} == {registry.basic}
        elsewhere = {one.authorization for one in registry.requests if one.path != "/token"}
        assert elsewhere == {None, *(f"Bearer {token}" for token in registry.tokens)}


async def test_a_token_that_the_registry_forgot_is_fetched_again(tmp_path: Path) -> None:
    async with hostile_registry() as registry:
        registry.demand = "bearer"
        credentials = logins(tmp_path / "config.json", registry)
        async with client_of(registry, credentials=credentials) as client:
            await tags(client)
            registry.tokens.clear()
            assert await tags(client) == 200


async def test_strangers_get_tokens_for_what_is_public() -> None:
    async with hostile_registry() as registry:
        registry.demand, registry.is_public = "bearer", True
        async with client_of(registry) as client:
            assert await tags(client) == 200
            with pytest.raises(Denied) as caught:
                await tags(client, actions="pull,push")
        assert caught.value.item == f"token server of {registry.name}"
        assert caught.value.expected == "a login; there is none for it in no credentials file"
        assert caught.value.actual == "401 (UNAUTHORIZED: wrong login)"
        assert {one.authorization for one in registry.requests if one.path == "/token"} == {None}


async def test_an_identity_token_is_exchanged_by_post(tmp_path: Path) -> None:
    async with hostile_registry() as registry:
        registry.demand = "bearer"
        credentials = logins(
            tmp_path / "config.json", registry, identitytoken=registry.identity_token
        )
        async with client_of(registry, credentials=credentials) as client:
            assert await tags(client) == 200
        [asked] = [one for one in registry.requests if one.path == "/token"]
        assert asked.method == "POST"
        assert asked.authorization is None
        assert registry.identity_token not in str(asked.query)


async def test_an_identity_token_is_never_sent_as_basic(tmp_path: Path) -> None:
    async with hostile_registry() as registry:
        registry.demand = "basic"
        credentials = logins(
            tmp_path / "config.json", registry, identitytoken=registry.identity_token
        )
        async with client_of(registry, credentials=credentials) as client:
            with pytest.raises(Denied, match="the registry demands a login"):
                await tags(client)
        assert registry.logins == [None]


async def test_the_scope_asked_for_is_ours_whatever_the_registry_proposes(tmp_path: Path) -> None:
    async with hostile_registry() as registry:
        registry.demand = "bearer"
        greedy = (
            f'Bearer realm="{registry.token_realm}",scope="repository:{REPOSITORY}:pull,push,delete'
            ' repository:other:push"'
        )
        credentials = logins(tmp_path / "config.json", registry)
        registry.misbehave(answered(401, **demanding(greedy)), on="/tags/", times=1)
        registry.demand = "nothing"
        async with client_of(registry, credentials=credentials) as client:
            assert await tags(client) == 200
        assert list(registry.tokens.values()) == [f"repository:{REPOSITORY}:pull"]


async def test_a_token_server_elsewhere_gets_the_login_and_the_registry_only_the_token(
    tmp_path: Path,
) -> None:
    async with hostile_registry() as registry, hostile_registry() as tokens:
        registry.demand, tokens.demand = "bearer", "bearer"
        registry.token_realm = tokens.token_realm
        registry.tokens = tokens.tokens
        credentials = logins(tmp_path / "config.json", registry)
        async with client_of(registry, credentials=credentials) as client:
            assert await tags(client) == 200
        assert tokens.logins == [registry.basic]
        [token] = tokens.tokens
        assert registry.logins == [None, f"Bearer {token}"]


async def test_a_token_server_gets_no_login_over_plain_http_from_a_registry_with_tls(
    tmp_path: Path,
) -> None:
    files = make_tls_files(tmp_path, "127.0.0.1")
    async with hostile_registry(tls=files) as registry, hostile_registry() as tokens:
        registry.demand = "bearer"
        registry.token_realm = tokens.token_realm
        credentials = logins(tmp_path / "config.json", registry)
        async with client_of(registry, credentials=credentials) as client:
            with pytest.raises(Untrusted) as caught:
                await tags(client)
        assert caught.value.rule == "a token realm must not lead from TLS to plain HTTP"
        assert registry.url in str(caught.value)
        assert tokens.url in str(caught.value)
        assert tokens.requests == []
        assert registry.logins == [None]


async def test_a_token_server_that_redirects_is_not_followed(tmp_path: Path) -> None:
    async with hostile_registry() as registry, hostile_registry() as other:
        registry.demand = "bearer"
        registry.misbehave(redirected(f"{other.url}/token"), on="/token")
        credentials = logins(tmp_path / "config.json", registry)
        async with client_of(registry, credentials=credentials) as client:
            with pytest.raises(Untrusted) as caught:
                await tags(client)
        assert caught.value.item == f"token server of {registry.name}"
        assert (caught.value.expected, caught.value.actual) == ("200", "307")
        assert other.requests == []


@pytest.mark.parametrize(
    ("demand", "kind", "words"),
    [
        ("Negotiate", Untrusted, "Bearer or Basic, got negotiate"),
        ("", Untrusted, "Bearer or Basic, got none"),
        ('Bearer service="x"', FormatError, "must be an http or https URL"),
        ('Bearer realm="ftp://127.0.0.1/"', FormatError, "must be an http or https URL; got ftp"),
        ('Bearer realm="http://a:b@127.0.0.1/"', FormatError, "must not hold a user name"),
        ('Bearer realm="http://127.1/"', FormatError, "a host is a DNS name or an IP address"),
        ('Basic realm="', FormatError, "must be challenges"),
    ],
)
async def test_demands_that_no_registry_may_make_are_refused(
    tmp_path: Path, demand: str, kind: type[Refusal], words: str
) -> None:
    async with hostile_registry() as registry:
        registry.misbehave(answered(401, **demanding(demand)), on="/tags/")
        credentials = logins(tmp_path / "config.json", registry)
        async with client_of(registry, credentials=credentials) as client:
            with pytest.raises(kind) as caught:
                await tags(client)
        assert words in str(caught.value)
        assert registry.logins == [None]


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b"[]", b'{"token": 1}', b'{"token": "two words"}', b'{"token": "a\\r\\nx: y"}',
     b'{"token": "' + b"a" * 20_000 + b'"}', b'{"token": "t0ken-9", "expires_in": "x"}',
     b"[" * 50_000],
)  # fmt: skip
async def test_token_answers_that_hold_no_token_are_refused_unseen(body: bytes) -> None:
    async with hostile_registry() as registry:
        registry.demand, registry.is_public = "bearer", True
        registry.misbehave(other_body(body), on="/token")
        async with client_of(registry) as client:
            with pytest.raises(Untrusted) as caught:
                await tags(client)
        assert caught.value.rule.startswith("the token server must answer with a JSON object")
        assert caught.value.actual == f"another answer from {registry.url}"


async def test_an_endless_token_answer_ends_at_its_bound() -> None:
    async with hostile_registry() as registry:
        registry.demand, registry.is_public = "bearer", True
        registry.misbehave(other_body(bytes(70_000)), on="/token")
        async with client_of(registry) as client:
            with pytest.raises(Untrusted, match="at most 65536 bytes"):
                await tags(client)


async def test_a_token_server_may_fail_for_a_while_but_not_for_ever() -> None:
    async with hostile_registry() as registry:
        registry.demand, registry.is_public = "bearer", True
        fault = registry.misbehave(answered(503), on="/token", times=2)
        async with client_of(registry) as client:
            assert await tags(client) == 200
            registry.tokens.clear()
            fault.change, fault.times = answered(429, "TOOMANYREQUESTS"), None
            with pytest.raises(Busy) as caught:
                await tags(client)
        assert caught.value.actual == "429 (TOOMANYREQUESTS)"


async def test_a_helper_is_named_once_a_login_is_demanded(tmp_path: Path) -> None:
    async with hostile_registry() as registry:
        helpers = msgspec.json.encode({"credHelpers": {registry.name: "desktop"}})
        (tmp_path / "config.json").write_bytes(helpers)
        credentials = load_credentials(tmp_path / "config.json")
        async with client_of(registry, credentials=credentials) as client:
            assert await tags(client) == 200
        registry.demand = "basic"
        async with client_of(registry, credentials=credentials) as client:
            with pytest.raises(Denied, match="credential helpers are left out"):
                await tags(client)


def echo_login(request: Request, reply: Reply) -> Reply:
    """An error that repeats what the client sent."""
    given = (request.authorization or "").rpartition(" ")[2]
    body = msgspec.json.encode({"errors": [{"code": "DENIED", "message": f"not {given}"}]})
    return Reply(status=403, body=body)


def echo_login_in_headers(request: Request, reply: Reply) -> Reply:
    given = (request.authorization or "").rpartition(" ")[2]
    return msgspec.structs.replace(reply, headers={"content-encoding": f"x{given}"})


@pytest.mark.parametrize("change", [echo_login, echo_login_in_headers])
@pytest.mark.parametrize("demand", ["basic", "bearer"])
async def test_no_error_and_no_log_shows_a_credential_even_if_the_registry_repeats_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, demand: str, change: Change
) -> None:
    caplog.set_level(logging.DEBUG)
    async with hostile_registry() as registry:
        registry.demand = "basic" if demand == "basic" else "bearer"
        registry.misbehave(change, on="/v2/")
        digest = registry.contents.add_blob(DATA)
        credentials = logins(tmp_path / "config.json", registry)
        async with client_of(registry, credentials=credentials) as client:
            for ask in (lambda: tags(client), lambda: downloaded(client, digest)):
                with pytest.raises(Refusal) as caught:
                    await ask()
                assert caught.value.actual == "withheld: its words repeat a credential"
                shown = f"{caught.value!r} {caught.value} {caught.value.to_dict()}"
                for secret in secrets_of(registry):
                    assert secret not in shown
        for secret in secrets_of(registry):
            assert secret not in caplog.text


def secrets_of(registry: HostileRegistry) -> set[str]:
    return {registry.password, registry.basic.removeprefix("Basic "), *registry.tokens}


async def test_a_login_is_not_sent_to_where_the_registry_redirects(tmp_path: Path) -> None:
    async with hostile_registry() as registry, hostile_registry() as other:
        registry.demand = "basic"
        other.demand = "basic"
        other.user, other.password = registry.user, registry.password
        digest = registry.contents.add_blob(DATA)
        other.contents.add_blob(DATA)
        registry.misbehave(redirected(other.url))
        # Even a login for that other host is not given: the registry chose it, not the owner.
        credentials = logins(tmp_path / "config.json", registry, other)
        async with client_of(registry, credentials=credentials) as client:
            with pytest.raises(Denied) as caught:
                await downloaded(client, digest)
        assert caught.value.rule == "a login is not sent to where the registry leads"
        assert caught.value.expected == f"no login at {other.url}, only at {registry.url}"
        assert other.logins == [None]
