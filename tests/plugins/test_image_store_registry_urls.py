from __future__ import annotations

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugins.image_store.registry.urls import origin_of, parse_url, require_reachable
from supervisor.formats.errors import FormatError, Untrusted

REGISTRY = httpx.URL("https://registry.example.org")
PLAIN = httpx.URL("http://registry.example.org")
LOCAL = httpx.URL("http://127.0.0.1:5000")
LOCAL_TLS = httpx.URL("https://127.0.0.1:5000")


def test_an_origin_always_has_its_port() -> None:
    assert origin_of(httpx.URL("https://Example.org/a?b")) == "https://example.org:443"
    assert origin_of(httpx.URL("http://example.org:80")) == "http://example.org:80"
    assert origin_of(httpx.URL("https://[::1]:1/")) == "https://[::1]:1"


def test_a_url_is_resolved_and_loses_its_fragment() -> None:
    url = parse_url("../x?y=z#f", item="i", base=httpx.URL("https://example.org/a/b/c"))
    assert str(url) == "https://example.org/a/x?y=z"


@pytest.mark.parametrize(
    "text",
    [
        "ftp://example.org/",
        "file:///etc/passwd",
        "https://user:secret-word@example.org/",
        "https:///nowhere",
        "https://127.1/",
        "https://exa mple.org/secret-word",
        "https://[::1/secret-word",
        "https://example.org:99999/secret-word",
        "relative/secret-word",
        "",
        "https://example.org/" + "secret-word" * 1000,
    ],
)
def test_other_urls_are_refused_without_showing_them(text: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_url(text, item="the location")
    assert caught.value.item == "the location"
    assert "secret-word" not in str(caught.value)


@given(st.text(max_size=60))
def test_no_text_makes_the_parser_of_urls_fail_otherwise(text: str) -> None:
    for base in (None, REGISTRY):
        try:
            url = parse_url(text, item="i", base=base)
        except FormatError:
            continue
        assert url.scheme in ("http", "https")


@pytest.mark.parametrize(
    ("source", "target", "plain_http"),
    [
        (REGISTRY, "https://cdn.example.net/x", False),
        (PLAIN, "https://cdn.example.net/x", True),
        (PLAIN, "http://cdn.example.net/x", True),
        (LOCAL, "http://127.0.0.1:6000/x", False),
        (LOCAL, "http://localhost:6000/x", False),
        (LOCAL, "https://cdn.example.net/x", False),
        (LOCAL, "http://cdn.example.net/x", True),
        (LOCAL_TLS, "https://127.0.0.1:6000/x", False),
    ],
)
def test_where_a_registry_may_send_us(source: httpx.URL, target: str, plain_http: bool) -> None:
    require_reachable(source, httpx.URL(target), plain_http=plain_http, item="i", what="redirect")


@pytest.mark.parametrize(
    ("source", "target", "plain_http", "rule"),
    [
        (REGISTRY, "http://cdn.example.net/x", False, "from TLS to plain HTTP"),
        (REGISTRY, "http://cdn.example.net/x", True, "from TLS to plain HTTP"),
        (REGISTRY, "https://127.0.0.1/x", True, "to this machine's loopback"),
        (REGISTRY, "https://localhost/x", False, "to this machine's loopback"),
        (REGISTRY, "https://0.0.0.0/x", False, "to this machine's loopback"),
        (REGISTRY, "https://[::ffff:127.0.0.1]/x", False, "to this machine's loopback"),
        (PLAIN, "http://127.0.0.1/x", True, "to this machine's loopback"),
        (LOCAL_TLS, "http://127.0.0.1:6000/x", False, "from TLS to plain HTTP"),
        (LOCAL, "http://cdn.example.net/x", False, "from loopback to plain HTTP elsewhere"),
    ],
)
def test_where_it_may_not_and_both_hosts_are_named(
    source: httpx.URL, target: str, plain_http: bool, rule: str
) -> None:
    url = httpx.URL(target)
    with pytest.raises(Untrusted) as caught:
        require_reachable(source, url, plain_http=plain_http, item="i", what="redirect")
    assert rule in caught.value.rule
    assert origin_of(source) in str(caught.value)
    assert caught.value.actual == origin_of(url)
