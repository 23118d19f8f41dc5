"""What a container may ask through its own socket: who it is, evidence about itself, and what
evidence for others says in its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router

from plugins.http_api.answers import json_bytes, json_response
from plugins.http_api.requests import nonce_bytes, read_json
from supervisor.formats.digest import check_hex
from supervisor.formats.status import AttestationData

if TYPE_CHECKING:
    from supervisor import ContainerOperations


class _Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`nonce` and `public_key_sha384` are lower-case hex, `user_data` is base64."""

    nonce: str
    public_key_sha384: str | None = None
    user_data: bytes | None = None


async def _evidence(request: Request) -> Response:
    wanted = await read_json(request, _Wanted)
    if wanted.public_key_sha384 is not None:
        check_hex("sha384", wanted.public_key_sha384, item="request.public_key_sha384")
    evidence = await _operations(request).evidence(
        nonce_bytes(wanted.nonce),
        public_key_sha384=wanted.public_key_sha384,
        user_data=wanted.user_data,
    )
    return json_bytes(evidence)


async def _self(request: Request) -> Response:
    operations = _operations(request)
    return json_response({"container_id": operations.container_id, "image_id": operations.image_id})


async def _set_attestation_data(request: Request) -> Response:
    data = await read_json(request, AttestationData)
    _operations(request).set_attestation_data(data)
    return json_response({})


async def _forget_attestation_data(request: Request) -> Response:
    _operations(request).set_attestation_data(None)
    return json_response({})


def _operations(request: Request) -> ContainerOperations:
    # All containers share these routes; the connection says whose socket it came through.
    operations: ContainerOperations = request.scope["state"]["operations"]
    return operations


CONTAINER_ROUTES = Router(
    [
        Route("/evidence", _evidence, methods=["POST"]),
        Route("/self", _self, methods=["GET"]),
        Route("/attestation-data", _set_attestation_data, methods=["PUT"]),
        Route("/attestation-data", _forget_attestation_data, methods=["DELETE"]),
    ],
    redirect_slashes=False,
)
