"""ACON's management API, so that its clients and its images work here.

`restart`, `exec` and the OpenID calls are not here: they answer 404 by their name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from plugins.http_api.answers import json_response
from plugins.http_api.exchange import Exchange, exchange_of
from plugins.http_api.forms import only_fields, parse_multipart, parse_urlencoded
from plugins.http_api.requests import number
from supervisor import FormatError, ManifestUpload, UnknownItem
from supervisor.formats.digest import Digest, parse_digest

if TYPE_CHECKING:
    from plugins.http_api.uploads import Uploads
    from supervisor import ContainerView, Operations

_ALGORITHM_BY_ALG = {"1": "sha256", "2": "sha384", "4": "sha512"}
_U32_MAX = (1 << 32) - 1
_U64_MAX = (1 << 64) - 1
_I32_MAX = (1 << 31) - 1
# The state letter of /proc/PID/stat, as ACON reports it; 0 is "terminated".
_STATE_RUNNING = ord("R")


class V1:
    """The routes over one supervisor."""

    def __init__(
        self, operations: Operations, uploads: Uploads, *, transfer_deadline_s: float
    ) -> None:
        self._operations = operations
        self._uploads = uploads
        self._transfer_deadline_s = transfer_deadline_s

    def routes(self) -> list[Route]:
        container = "/api/v1/container"
        return [
            Route("/api/v1/manifest", self._add_manifest, methods=["POST"]),
            Route("/api/v1/manifest/finalize", self._finalize, methods=["POST"]),
            Route("/api/v1/manifest/{image_id:path}", self._manifest, methods=["GET"]),
            Route("/api/v1/blob/{name}", self._put_blob, methods=["PUT"]),
            Route("/api/v1/blob/{name}", self._blob_size, methods=["GET"]),
            Route(f"{container}/start", self._start, methods=["POST"]),
            Route(f"{container}/inspect", self._inspect, methods=["GET"]),
            Route(f"{container}/report", self._report, methods=["GET"]),
            Route(f"{container}/{{id}}/inspect", self._inspect, methods=["GET"]),
            Route(f"{container}/{{id}}/kill", self._kill, methods=["POST"]),
        ]

    async def _add_manifest(self, request: Request) -> Response:
        fields = await _read_multipart(exchange_of(request))
        only_fields(fields, required=("manifest", "sig", "cert"))
        image = ManifestUpload(
            manifest=fields["manifest"], signature=fields["sig"], certificate_der=fields["cert"]
        )
        result = await self._operations.admit([image])
        return json_response(
            {"image_id": result.image_ids[0], "missing_layers": result.missing_layers}
        )

    async def _finalize(self, request: Request) -> Response:
        await self._operations.seal()
        return Response()

    async def _manifest(self, request: Request) -> Response:
        image = self._operations.manifest(request.path_params["image_id"])
        return json_response(
            {
                "manifest": image.manifest.decode(),
                "certificate": list(image.certificate_der),
            }
        )

    async def _put_blob(self, request: Request) -> Response:
        exchange = exchange_of(request)
        exchange.allow(self._transfer_deadline_s)
        await self._uploads.receive(_blob_digest(request), exchange)
        return Response()

    async def _blob_size(self, request: Request) -> Response:
        digest = _blob_digest(request)
        state = self._uploads.state(digest)
        if state.received_bytes is None:
            raise UnknownItem(str(digest), "is here, but was not uploaded: its size is not kept")
        if state.state == "absent":
            raise UnknownItem(str(digest), "is not here")
        return json_response(state.received_bytes)

    async def _start(self, request: Request) -> Response:
        exchange = exchange_of(request)
        image_id = request.query_params.get("image_id")
        if image_id is None:
            raise FormatError("image_id", "must be given in the query")
        environment: list[str] = []
        if exchange.content_length != 0:
            fields = await _read_multipart(exchange)
            only_fields(fields, optional=("env",))
            environment = _lines(fields.get("env", b""))
        container_id = await self._operations.start(image_id, environment)
        return json_response({"container_id": container_id})

    async def _kill(self, request: Request) -> Response:
        container_id = _container_id(request.path_params["id"])
        exchange = exchange_of(request)
        # ACON's own client sends this form without a Content-Type.
        if exchange.headers.get("content-type", "").startswith("multipart/"):
            fields = await _read_multipart(exchange)
            signum = fields.get("signal_num", b"").decode("ascii", "replace")
        else:
            signum = parse_urlencoded(await exchange.read_body()).get("signal_num", "")
        await self._operations.signal(
            container_id, number(signum, item="signal_num", minimum=-_I32_MAX, maximum=_I32_MAX)
        )
        return Response()

    async def _inspect(self, request: Request) -> Response:
        wanted = _container_id(request.path_params.get("id", "0"))
        views = self._operations.containers()
        if wanted != 0:
            views = tuple(view for view in views if view.container_id == wanted)
            if not views:
                raise UnknownItem(f"container {wanted}", "is not here")
        return json_response({"info": [_container_info(view) for view in views]})

    async def _report(self, request: Request) -> Response:
        query = request.query_params
        low = number(query.get("nonce_lo"), item="nonce_lo", minimum=0, maximum=_U64_MAX)
        high = number(query.get("nonce_hi"), item="nonce_hi", minimum=0, maximum=_U64_MAX)
        kind = number(query.get("request_type", "0"), item="request_type", minimum=0, maximum=1)
        report = await self._operations.acon_report(
            low.to_bytes(8, "little") + high.to_bytes(8, "little"), want_quote=kind == 1
        )
        logs: dict[str, dict[str, tuple[str, ...]]] = {
            str(index): {"logs": ()} for index in range(4)
        }
        return json_response(
            {
                "data": list(report.data),
                "mrlog": logs | {str(report.rtmr_index): {"logs": report.log_lines}},
                # ACON's daemon writes the first name, its client reads the second.
                "attestation_data": report.attestation_data,
                "attestationData": report.attestation_data,
            }
        )


async def _read_multipart(exchange: Exchange) -> dict[str, bytes]:
    content_type = exchange.headers.get("content-type", "")
    return parse_multipart(content_type, await exchange.read_body())


def _blob_digest(request: Request) -> Digest:
    """From `DIGEST` or `DIGEST.tar` and the query's `alg`."""
    alg = request.query_params.get("alg", "2")
    algorithm = _ALGORITHM_BY_ALG.get(alg)
    if algorithm is None:
        raise FormatError("alg", "must be 1, 2 or 4", actual=alg[:40])
    name: str = request.path_params["name"]
    return parse_digest(
        f"{algorithm}/{name.removesuffix('.tar')}",
        item="blob",
        # Whether SHA-256 layers are wanted is the supervisor's to say, which knows its setting.
        unsafe_allow_sha256=True,
    )


def _container_id(text: str) -> int:
    return number(text, item="container id", minimum=0, maximum=_U32_MAX)


def _lines(field: bytes) -> list[str]:
    try:
        text = field.decode()
    except UnicodeDecodeError as error:
        raise FormatError("form.env", "must be UTF-8", actual=error) from None
    return [line for line in text.split("\n") if line]


def _container_info(view: ContainerView) -> dict[str, object]:
    return {
        "container_id": view.container_id,
        "state": 0 if view.state == "exited" else _STATE_RUNNING,
        # As wait(2) encodes it.
        "wstatus": (view.exit_code or 0) << 8 | (view.signal or 0),
        "image_id": view.image_id,
        "exe_path": view.argv[0],
    }
