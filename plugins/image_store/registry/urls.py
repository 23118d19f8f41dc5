"""Addresses that a registry names (redirects, token realms, upload locations): which of
them may be asked, and which may see credentials.

A registry is not trusted with more than its own credentials. So an address that it names is
never asked over plain HTTP when the registry was reached by TLS, and never on this machine's
loopback unless the registry is there itself: what listens there believes itself unreachable.
"""

from __future__ import annotations

import httpx

from plugins.image_store.registry.names import check_host, is_local
from supervisor.formats.errors import FormatError, Untrusted

MAX_URL_CHARACTERS = 8192
_DEFAULT_PORTS = {"http": 80, "https": 443}


def parse_url(text: str, *, item: str, base: httpx.URL | None = None) -> httpx.URL:
    """An absolute http or https URL, resolved against `base` (RFC 3986); a fragment is cut off.

    Raises `FormatError`, which never shows more of `text` than its host: paths and queries
    of such URLs hold signatures.
    """
    if len(text) > MAX_URL_CHARACTERS:
        raise FormatError(
            item,
            "a URL has a bounded length",
            expected=f"{MAX_URL_CHARACTERS} characters",
            actual=len(text),
        )
    try:
        url = httpx.URL(text) if base is None else base.join(text)
        host = url.raw_host.decode("ascii")
        has_login = bool(url.userinfo)
        url = url.copy_with(fragment=None)
    except (httpx.InvalidURL, ValueError):
        raise FormatError(item, "must be a URL") from None
    if url.scheme not in _DEFAULT_PORTS:
        raise FormatError(item, "must be an http or https URL", actual=url.scheme[:32])
    if has_login:
        raise FormatError(item, "a URL must not hold a user name or password", actual=host)
    check_host(host, item=item)
    if url.port is not None and not 1 <= url.port <= 65535:
        raise FormatError(item, "a port lies between 1 and 65535", actual=url.port)
    return url


def origin_of(url: httpx.URL) -> str:
    """`SCHEME://HOST:PORT`, the port always written: equal for the same origin only."""
    host = url.raw_host.decode("ascii")
    shown = f"[{host}]" if ":" in host else host
    return f"{url.scheme}://{shown}:{url.port or _DEFAULT_PORTS[url.scheme]}"


def require_reachable(
    source: httpx.URL, target: httpx.URL, *, plain_http: bool, item: str, what: str
) -> None:
    """Refuse `target` unless somebody at `source` may send us there; see the module.

    `what` names its role ("redirect"), `plain_http` is what the configuration says of the
    registry. Raises `Untrusted` that names both hosts.
    """
    from_loopback = _is_local(source)
    if _is_local(target) and not from_loopback:
        rule = f"a {what} must not lead from another host to this machine's loopback"
    elif target.scheme == "https":
        return
    elif source.scheme == "https":
        rule = f"a {what} must not lead from TLS to plain HTTP"
    elif plain_http or (from_loopback and _is_local(target)):
        return
    else:
        rule = f"a {what} must not lead from loopback to plain HTTP elsewhere (plain_http)"
    raise Untrusted(
        item,
        rule,
        expected=f"https, from {origin_of(source)}",
        actual=origin_of(target),
    )


def _is_local(url: httpx.URL) -> bool:
    return is_local(url.raw_host.decode("ascii"))
