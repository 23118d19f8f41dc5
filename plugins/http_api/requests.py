"""What routes read from requests: JSON bodies, path and query parameters, nonces."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypeVar

import msgspec
from starlette.requests import Request

from plugins.http_api.exchange import exchange_of
from supervisor import FormatError
from supervisor.formats import canonical_json, typed_json
from supervisor.formats.digest import parse_digest

if TYPE_CHECKING:
    from supervisor.formats.digest import Digest

_S = TypeVar("_S", bound=msgspec.Struct)
_HEX = re.compile(r"([0-9a-f]{2})*", re.ASCII)
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,19})", re.ASCII)
_MIN_NONCE_BYTES = 16
_MAX_NONCE_BYTES = 64
_MAX_CONTAINER_ID = (1 << 32) - 1


async def read_json(request: Request, struct_type: type[_S]) -> _S:
    """The body as `struct_type`: no unknown or duplicate key, no wrong type, no bytes beyond
    the server's bound. Raises `FormatError` naming the path.
    """
    body = await exchange_of(request).read_body()
    value = canonical_json.decode(body, item="request", max_bytes=len(body))
    return typed_json.to_struct(value, struct_type, item="request")


def layer_digest(request: Request) -> Digest:
    """From the path parameters `algorithm` and `hex`."""
    return parse_digest(
        f"{request.path_params['algorithm']}/{request.path_params['hex']}",
        item="layer",
        # Whether SHA-256 layers are wanted is the supervisor's to say, which knows its setting.
        unsafe_allow_sha256=True,
    )


def query(request: Request, *names: str) -> dict[str, str]:
    """The query's parameters, each once and only these. Raises `FormatError`."""
    pairs = request.query_params.multi_items()
    given = dict(pairs)
    if len(given) != len(pairs) or not given.keys() <= set(names):
        raise FormatError(
            "query",
            "has the parameters of this call, each once at most",
            expected=" ".join(names),
            actual=" ".join(name for name, _ in pairs)[:160],
        )
    return given


def container_id(request: Request, *, minimum: int = 1) -> int:
    """From the path parameter `id`."""
    return number(
        request.path_params["id"], item="container id", minimum=minimum, maximum=_MAX_CONTAINER_ID
    )


def number(text: str | None, *, item: str, minimum: int, maximum: int) -> int:
    """A decimal number without sign tricks, spaces or leading zeros. Raises `FormatError`."""
    if text is None or _NUMBER.fullmatch(text) is None or not minimum <= int(text) <= maximum:
        raise FormatError(
            item,
            "must be a decimal number",
            expected=f"{minimum} to {maximum}",
            actual="nothing" if text is None else text[:40],
        )
    return int(text)


def nonce_bytes(text: str) -> bytes:
    """16 to 64 bytes from lower-case hex. Raises `FormatError`."""
    if _HEX.fullmatch(text) is None or not (_MIN_NONCE_BYTES <= len(text) // 2 <= _MAX_NONCE_BYTES):
        raise FormatError(
            "request.nonce",
            "is lower-case hex",
            expected=f"{_MIN_NONCE_BYTES} to {_MAX_NONCE_BYTES} bytes",
            actual=text[:160],
        )
    return bytes.fromhex(text)
