"""Names of registries, repositories, tags and blobs: their grammar, held before any use.

OCI distribution specification 1.1, "Pulling manifests" (repository, tag), OCI image
specification 1.1, descriptor.md (digests). Registries are HOST or HOST:PORT.
"""

from __future__ import annotations

import ipaddress
import re

from supervisor.formats.digest import DIGEST_SIZES_BYTES, check_hex
from supervisor.formats.errors import FormatError

DOCKER_HUB = "docker.io"
# Docker Hub is spoken of by names that serve no API; every client knows this table.
_HUB_NAMES = frozenset({DOCKER_HUB, "index.docker.io", "registry-1.docker.io"})
_HUB_API_HOST = "registry-1.docker.io"

MAX_REPOSITORY_CHARACTERS = 255
_MAX_HOST_CHARACTERS = 253
_SHOWN_CHARACTERS = 160

_REPOSITORY = re.compile(
    r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*"
)
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_REGISTRY = re.compile(r"(?P<host>\[[0-9a-f:.]+\]|[^\[\]:/@?#\s]+)(?::(?P<port>[0-9]{1,5}))?")


def parse_registry(text: str, *, item: str = "registry") -> str:
    """HOST or HOST:PORT in its one spelling: lower case, Docker Hub as `docker.io`.

    HOST is a DNS name, an IPv4 address or an IPv6 address in brackets. Raises `FormatError`.
    """
    lower = text.lower() if text.isascii() else text
    found = _REGISTRY.fullmatch(lower)
    if found is None:
        raise FormatError(item, "a registry is HOST or HOST:PORT", actual=text[:_SHOWN_CHARACTERS])
    host, port = found["host"], found["port"]
    check_host(host.strip("[]"), item=item)
    if port is not None and not 1 <= int(port) <= 65535:
        raise FormatError(item, "a port lies between 1 and 65535", actual=port)
    if lower in _HUB_NAMES:
        return DOCKER_HUB
    return host if port is None else f"{host}:{int(port)}"


def api_host(registry: str) -> str:
    """Where the API of a registry (as `parse_registry` spells it) is: HOST or HOST:PORT."""
    return _HUB_API_HOST if registry == DOCKER_HUB else registry


def host_of(registry: str) -> str:
    """The host alone of a registry as `parse_registry` spells it, IPv6 without brackets."""
    if registry.startswith("["):
        return registry[1 : registry.index("]")]
    return registry.partition(":")[0]


def check_host(host: str, *, item: str) -> None:
    """Refuse what is neither an IP address nor a DNS name, lower case, IPv6 without brackets.

    A name that ends in a number is refused unless it is a plain IPv4 address: resolvers take
    `127.1` and `0x7f.1` for loopback, and `is_local` could not see it.
    """
    if _address(host) is not None:
        return
    labels = host.split(".")
    numeric = labels[-1].isdigit() or labels[-1].startswith("0x")
    if (
        len(host) > _MAX_HOST_CHARACTERS
        or numeric
        or not all(_LABEL.fullmatch(label) for label in labels)
    ):
        raise FormatError(
            item, "a host is a DNS name or an IP address", actual=host[:_SHOWN_CHARACTERS]
        )


def is_local(host: str) -> bool:
    """Whether a host that passed `check_host` is this machine's loopback, by its spelling."""
    address = _address(host)
    if address is None:
        return host == "localhost" or host.endswith(".localhost")
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    # Linux connects the unspecified address to loopback.
    return address.is_loopback or address.is_unspecified


def check_repository(text: str, *, item: str = "repository") -> None:
    """Raises `FormatError` unless `text` is a repository's name of 255 characters at most."""
    if len(text) > MAX_REPOSITORY_CHARACTERS or not _REPOSITORY.fullmatch(text):
        raise FormatError(
            item,
            "a repository's name is lower-case words joined by '.', '_', '__', '-' and '/', "
            f"{MAX_REPOSITORY_CHARACTERS} characters at most",
            actual=text[:_SHOWN_CHARACTERS],
        )


def check_tag(text: str, *, item: str = "tag") -> None:
    """Raises `FormatError` unless `text` is a tag."""
    if not _TAG.fullmatch(text):
        raise FormatError(
            item,
            "a tag is 1 to 128 letters, digits, '_', '.' and '-', the first no '.' or '-'",
            actual=text[:_SHOWN_CHARACTERS],
        )


def parse_blob_digest(text: str, *, item: str = "blob_digest") -> tuple[str, str]:
    """`ALGORITHM:HEX` as its two parts. Raises `FormatError`, also for an unknown algorithm."""
    algorithm, colon, hex_digits = text.partition(":")
    if not colon or algorithm not in DIGEST_SIZES_BYTES:
        raise FormatError(
            item,
            "a digest is written ALGORITHM:HEX",
            expected=" or ".join(sorted(DIGEST_SIZES_BYTES)),
            actual=text[:_SHOWN_CHARACTERS],
        )
    check_hex(algorithm, hex_digits, item=item)
    return algorithm, hex_digits


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None:
        return None
    return address
