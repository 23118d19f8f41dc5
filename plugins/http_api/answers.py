"""Refusals and values as HTTP answers: JSON, or plain text for ACON's clients."""

from __future__ import annotations

import msgspec
from starlette.responses import PlainTextResponse, Response

from supervisor import (
    Busy,
    Conflict,
    DeadlineExceeded,
    Denied,
    MeasurementHalted,
    PolicyDenied,
    Refusal,
    UnknownItem,
    Untrusted,
)

V1_PREFIX = "/api/v1/"


class NoSuchCall(UnknownItem):
    """No such path, or not with this method."""


_STATUS_BY_CLASS: tuple[tuple[type[Refusal], int], ...] = (
    (Untrusted, 400),
    (Denied, 403),
    (UnknownItem, 404),
    (DeadlineExceeded, 408),
    (Conflict, 409),
    (Busy, 503),
    (MeasurementHalted, 503),
)

# ACON knows four: invalid argument 400, permission denied 401, deadline exceeded 408,
# otherwise 500. It denies permission to what its policy or the seal forbids. A missing
# call is 404 and a full server 503 in any HTTP API.
_V1_STATUS_BY_CLASS: tuple[tuple[type[Refusal], int], ...] = (
    (NoSuchCall, 404),
    (PolicyDenied, 401),
    (Denied, 401),
    (Conflict, 401),
    (Untrusted, 400),
    (UnknownItem, 400),
    (DeadlineExceeded, 408),
    (Busy, 503),
)


def _status_in(table: tuple[tuple[type[Refusal], int], ...], refusal: Refusal) -> int:
    return next((status for kind, status in table if isinstance(refusal, kind)), 500)


def refusal_response(refusal: Refusal, *, path: str) -> Response:
    """`{"error": ...}`, or ACON's plain text for the paths of its API."""
    response: Response
    if path.startswith(V1_PREFIX):
        status = _status_in(_V1_STATUS_BY_CLASS, refusal)
        response = PlainTextResponse(f"{refusal}\n", status)
    else:
        status = _status_in(_STATUS_BY_CLASS, refusal)
        response = json_response({"error": refusal.to_dict()}, status)
    if isinstance(refusal, Busy):
        response.headers["Retry-After"] = "1"
    return response


def json_response(value: object, status: int = 200) -> Response:
    """Structs, dicts, lists and scalars as JSON."""
    return json_bytes(msgspec.json.encode(value), status)


def json_bytes(encoded: bytes, status: int = 200) -> Response:
    """JSON that is encoded already."""
    return Response(encoded, status, media_type="application/json")
