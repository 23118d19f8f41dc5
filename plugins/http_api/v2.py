"""Our management API: groups, layers by digest, evidence, events. JSON in and out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from plugins.http_api.answers import json_bytes, json_response
from plugins.http_api.exchange import exchange_of
from plugins.http_api.requests import layer_digest, nonce_bytes, read_json
from plugins.http_api.streams import line_stream
from supervisor import LayerSource, ManifestUpload

if TYPE_CHECKING:
    from plugins.http_api.arrivals import Arrivals
    from plugins.http_api.event_ring import EventRing
    from plugins.http_api.followers import Followers
    from plugins.http_api.uploads import Uploads
    from supervisor import Operations


class _Image(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The three parts of a signed image, each standard base64."""

    manifest: bytes
    signature: bytes
    certificate: bytes


class _Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    images: tuple[_Image, ...]


class _Fetch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`source` says by its `type` ("file" or "registry") which of the two it is."""

    source: LayerSource


class _Nonce(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    nonce: str


class V2:
    """The routes over one supervisor, except those for containers (`v2_containers`)."""

    def __init__(
        self,
        operations: Operations,
        uploads: Uploads,
        arrivals: Arrivals,
        events: EventRing,
        followers: Followers,
        *,
        transfer_deadline_s: float,
    ) -> None:
        self._operations = operations
        self._uploads = uploads
        self._arrivals = arrivals
        self._events = events
        self._followers = followers
        self._transfer_deadline_s = transfer_deadline_s

    def routes(self) -> list[Route]:
        layer = "/api/v2/layers/{algorithm}/{hex}"
        return [
            Route("/api/v2/images", self._admit, methods=["POST"]),
            Route("/api/v2/images", self._images, methods=["GET"]),
            Route(layer, self._put_layer, methods=["PUT"]),
            Route(layer, self._layer, methods=["GET"]),
            Route(f"{layer}/fetch", self._fetch_layer, methods=["POST"]),
            Route("/api/v2/seal", self._seal, methods=["POST"]),
            Route("/api/v2/status", self._status, methods=["GET"]),
            Route("/api/v2/events", self._event_lines, methods=["GET"]),
            Route("/api/v2/evidence", self._evidence, methods=["POST"]),
        ]

    async def _admit(self, request: Request) -> Response:
        group = await read_json(request, _Group)
        uploads = [
            ManifestUpload(
                manifest=image.manifest,
                signature=image.signature,
                certificate_der=image.certificate,
            )
            for image in group.images
        ]
        return json_response(await self._operations.admit(uploads))

    async def _images(self, request: Request) -> Response:
        return json_response({"images": self._operations.images()})

    async def _put_layer(self, request: Request) -> Response:
        exchange = exchange_of(request)
        exchange.allow(self._transfer_deadline_s)
        return json_response(await self._uploads.receive(layer_digest(request), exchange))

    async def _layer(self, request: Request) -> Response:
        digest = layer_digest(request)
        state = self._uploads.state(digest)
        if state.state != "verified":
            state = self._arrivals.state(digest) or state
        return json_response(state)

    async def _fetch_layer(self, request: Request) -> Response:
        wanted = await read_json(request, _Fetch)
        exchange_of(request).allow(self._transfer_deadline_s)
        digest = layer_digest(request)
        with self._arrivals.fetching(digest, wanted.source.size_bytes):
            await self._operations.fetch_layer(digest, wanted.source)
        return json_response({"state": "verified"})

    async def _seal(self, request: Request) -> Response:
        await self._operations.seal()
        return json_response({})

    async def _status(self, request: Request) -> Response:
        return json_bytes(self._operations.status())

    async def _event_lines(self, request: Request) -> Response:
        return line_stream(request, self._events, self._followers)

    async def _evidence(self, request: Request) -> Response:
        wanted = await read_json(request, _Nonce)
        return json_bytes(await self._operations.evidence(nonce_bytes(wanted.nonce)))
