from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugins.image_store.registry.credentials import (
    MAX_FILE_BYTES,
    Credentials,
    Login,
    load_credentials,
)
from supervisor import ConfigError, Denied, Refusal
from supervisor.formats.errors import FormatError

SECRET = "s3cret-pass"


def auth(user: str, password: str = SECRET) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def credentials(tmp_path: Path, content: object) -> Credentials:
    path = tmp_path / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_credentials(path)


def user_for(found: Credentials, registry: str, repository: str = "team/app") -> str | None:
    login = found.login(registry, repository)
    return None if login is None else login.user


def test_without_a_file_nobody_has_a_login() -> None:
    assert load_credentials(None).login("registry.example.org", "team/app") is None


@pytest.mark.parametrize(
    "key",
    [
        "registry.example.org:5000",
        "Registry.example.org:5000",
        "registry.example.org:5000/",
        "https://registry.example.org:5000",
        "http://registry.example.org:5000",
        "https://registry.example.org:5000/v1/",
        "https://registry.example.org:5000/v2/",
        "registry.example.org:5000/v2/",
    ],
)
def test_a_registry_is_found_under_every_key_that_docker_writes(tmp_path: Path, key: str) -> None:
    found = credentials(tmp_path, {"auths": {key: {"auth": auth("docker")}}})
    assert found.login("registry.example.org:5000", "team/app") == Login(
        user="docker", password=SECRET
    )
    assert found.login("registry.example.org", "team/app") is None
    assert found.login("registry.example.org:5001", "team/app") is None


def test_docker_hubs_old_key_is_docker_hub(tmp_path: Path) -> None:
    found = credentials(tmp_path, {"auths": {"https://index.docker.io/v1/": {"auth": auth("hub")}}})
    assert user_for(found, "docker.io", "library/alpine") == "hub"


def test_the_longest_of_podmans_keys_wins(tmp_path: Path) -> None:
    found = credentials(
        tmp_path,
        {
            "auths": {
                "registry.example.org/team/app/deep": {"auth": auth("deep")},
                "registry.example.org/team": {"auth": auth("team")},
                "registry.example.org": {"auth": auth("host")},
                "registry.example.org/team/app": {"auth": auth("app")},
            }
        },
    )
    assert user_for(found, "registry.example.org", "team/app") == "app"
    assert user_for(found, "registry.example.org", "team/app/deep/er") == "deep"
    assert user_for(found, "registry.example.org", "team/application") == "team"
    assert user_for(found, "registry.example.org", "teams") == "host"


def test_names_passwords_and_tokens_beside_auth_are_read(tmp_path: Path) -> None:
    found = credentials(
        tmp_path,
        {
            "auths": {
                "a.example.org": {"username": "u", "password": "p:q", "email": "x"},
                "b.example.org": {"auth": auth("<token>", "\0"), "identitytoken": "refresh"},
                "c.example.org": {},
            },
            "HttpHeaders": {"User-Agent": "x"},
            "detachKeys": "ctrl-e,e",
        },
    )
    assert found.login("a.example.org", "x") == Login(user="u", password="p:q")
    assert found.login("b.example.org", "x") == Login(user="<token>", identity_token="refresh")
    assert found.login("c.example.org", "x") is None


def test_a_password_may_hold_colons_and_any_character(tmp_path: Path) -> None:
    found = credentials(tmp_path, {"auths": {"a.example.org": {"auth": auth("ü", "a:ß:\n")}}})
    login = found.login("a.example.org", "x")
    assert login == Login(user="ü", password="a:ß:\n")
    assert base64.b64decode(login.basic.removeprefix("Basic ")).decode() == "ü:a:ß:\n"


@pytest.mark.parametrize(
    "helpers",
    [
        {"credsStore": "desktop"},
        {"credHelpers": {"registry.example.org": "desktop"}},
        {"credHelpers": {"https://registry.example.org/v1/": "desktop"}},
    ],
)
def test_a_credential_helper_is_left_out_with_what_to_do(
    tmp_path: Path, helpers: dict[str, object]
) -> None:
    found = credentials(tmp_path, {"auths": {"registry.example.org": {}}, **helpers})
    with pytest.raises(Denied) as caught:
        found.login("registry.example.org", "team/app")
    assert caught.value.item == "registry.example.org"
    assert "credential helpers are left out" in caught.value.rule
    assert "podman login --authfile" in caught.value.rule
    assert str(tmp_path / "config.json") in str(caught.value)
    assert caught.value.actual == "only the helper 'desktop'"


def test_a_store_that_noted_nothing_of_a_registry_is_only_mentioned(tmp_path: Path) -> None:
    found = credentials(tmp_path, {"auths": {"registry.example.org": {}}, "credsStore": "desktop"})
    assert found.login("other.example.org", "team/app") is None
    path = tmp_path / "config.json"
    assert found.source == f"{path} (its credsStore 'desktop' is left out)"


def test_a_helper_for_another_registry_or_beside_a_login_is_no_matter(tmp_path: Path) -> None:
    found = credentials(
        tmp_path,
        {
            "auths": {"a.example.org": {"auth": auth("here")}},
            "credHelpers": {"a.example.org": "desktop", "b.example.org": "desktop"},
        },
    )
    assert user_for(found, "a.example.org") == "here"
    assert user_for(found, "c.example.org") is None


@pytest.mark.parametrize(
    ("content", "item"),
    [
        ("{", ""),
        ("[]", ""),
        ('{"auths": []}', ".auths"),
        ('{"auths": {"a.example.org": {"auth": 1}}}', ".auths"),
        ('{"auths": {}, "auths": {}}', ".auths"),
        ('{"auths": {"a.example.org": {"auth": "s3cret-pass!"}}}', '.auths["a.example.org"].auth'),
        (
            json.dumps({"auths": {"a": {"auth": base64.b64encode(b"s3cret-pass").decode()}}}),
            ".auth",
        ),
        ('{"auths": {"a": {"username": "s3cret-pass:", "password": "s3cret-pass"}}}', ".username"),
        ("\ufeff{}", ""),
        ("[" * 5000, ""),
    ],
)
def test_a_wrong_file_is_refused_by_name_without_showing_what_it_holds(
    tmp_path: Path, content: str, item: str
) -> None:
    with pytest.raises(FormatError) as caught:
        credentials(tmp_path, content)
    assert caught.value.item.startswith(str(tmp_path / "config.json"))
    assert item in caught.value.item
    assert SECRET not in str(caught.value)


def test_a_file_that_is_not_there_or_no_file_is_refused_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, actual in (("absent", "No such file or directory"), ("pipe", None), (".", None)):
        with pytest.raises(ConfigError) as caught:
            load_credentials(tmp_path / name)
        assert caught.value.item == str(tmp_path / name)
        assert actual is None or caught.value.actual == actual


def test_a_file_beyond_its_bound_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="must not be larger than its limit"):
        credentials(tmp_path, "{}" + " " * MAX_FILE_BYTES)


def test_nothing_that_is_printed_holds_a_secret(tmp_path: Path) -> None:
    found = credentials(tmp_path, {"auths": {"a.example.org": {"auth": auth("u")}}})
    login = found.login("a.example.org", "x")
    for text in (repr(found), str(found), repr(login), str(login), f"{[login]}"):
        assert SECRET not in text
        assert auth("u") not in text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "auths",
                    "auth",
                    "username",
                    "password",
                    "identitytoken",
                    "credsStore",
                    "credHelpers",
                    "a.example.org",
                    "https://a.example.org/v1/",
                    "::",
                    "",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(JSON | st.text(max_size=30) | st.binary(max_size=30))
def test_no_file_makes_the_reader_fail_otherwise(
    tmp_path_factory: pytest.TempPathFactory, content: object
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    try:
        load_credentials(path).login("a.example.org", "team/app")
    except Refusal as error:
        assert str(path) in str(error)
