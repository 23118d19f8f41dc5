"""ACON's management API, so that its clients and its images work here.

The OpenID calls are not here: they answer 404 by their name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from plugins.http_api.answers import json_response
from plugins.http_api.exchange import Exchange, exchange_of
from plugins.http_api.forms import only_fields, parse_multipart, parse_urlencoded
from plugins.http_api.invocations import (
    MAX_CAPTURE_BYTES,
    MAX_TIMEOUT_S,
    invocation,
    restart_timeout_s,
)
from plugins.http_api.requests import container_id, number
from supervisor import FormatError, ManifestUpload, UnknownItem
from supervisor.formats.digest import Digest, parse_digest

if TYPE_CHECKING:
    from plugins.http_api.uploads import Uploads
    from supervisor import ContainerView, Operations

_ALGORITHM_BY_ALG = {"1": "sha256", "2": "sha384", "4": "sha512"}
_U64_MAX = (1 << 64) - 1
_I32_MAX = (1 << 31) - 1
# What ACON's daemon takes when its client says nothing.
_TIMEOUT_S = "30"
_CAPTURE_BYTES = str(0x20000)
# The state letter of /proc/PID/stat, as ACON reports it; 0 is "terminated".
_STATE_RUNNING = ord("R")


class V1:
    """The routes over one supervisor."""

    def __init__(
        self,
        operations: Operations,
        uploads: Uploads,
        *,
        transfer_deadline_s: float,
        request_deadline_s: float,
    ) -> None:
        self._operations = operations
        self._uploads = uploads
        self._transfer_deadline_s = transfer_deadline_s
        self._request_deadline_s = request_deadline_s

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
            Route(f"{container}/{{id}}/restart", self._restart, methods=["POST"]),
            Route(f"{container}/{{id}}/exec", self._exec, methods=["POST"]),
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
            environment = _lines(fields, "env")
        started = await self._operations.start(image_id, environment)
        return json_response({"container_id": started})

    async def _restart(self, request: Request) -> Response:
        wanted = container_id(request)
        timeout = request.query_params.get("timeout", _TIMEOUT_S)
        timeout_s = restart_timeout_s(
            number(timeout, item="timeout", minimum=1, maximum=MAX_TIMEOUT_S)
        )
        exchange_of(request).allow(timeout_s + self._request_deadline_s)
        await self._operations.restart(wanted, timeout_s=timeout_s)
        return Response()

    async def _exec(self, request: Request) -> Response:
        wanted = container_id(request)
        exchange = exchange_of(request)
        timeout = request.query_params.get("timeout", _TIMEOUT_S)
        capture = request.query_params.get("capture_size", _CAPTURE_BYTES)
        fields = await _read_multipart(exchange)
        only_fields(fields, required=("cmd",), optional=("env", "stdin"))
        command = _lines(fields, "cmd")
        if not command:
            raise FormatError("form.cmd", "must name an entry point in its first line")
        call = invocation(
            command[0],
            arguments=command[1:],
            environment=_lines(fields, "env"),
            stdin=fields.get("stdin", b""),
            timeout_s=number(timeout, item="timeout", minimum=1, maximum=MAX_TIMEOUT_S),
            capture_bytes=number(
                capture, item="capture_size", minimum=0, maximum=MAX_CAPTURE_BYTES
            ),
        )
        exchange.hold_bytes(2 * call.capture_bytes)
        exchange.allow(call.timeout_s + self._request_deadline_s)
        result = await self._operations.invoke(wanted, call)
        # How the command ended has no place in ACON's answer.
        return json_response({"stdout": list(result.stdout), "stderr": list(result.stderr)})

    async def _kill(self, request: Request) -> Response:
        wanted = container_id(request)
        exchange = exchange_of(request)
        # ACON's own client sends this form without a Content-Type.
        if exchange.headers.get("content-type", "").startswith("multipart/"):
            fields = await _read_multipart(exchange)
            signum = fields.get("signal_num", b"").decode("ascii", "replace")
        else:
            signum = parse_urlencoded(await exchange.read_body()).get("signal_num", "")
        await self._operations.signal(
            wanted, number(signum, item="signal_num", minimum=-_I32_MAX, maximum=_I32_MAX)
        )
        return Response()

    async def _inspect(self, request: Request) -> Response:
        wanted = container_id(request, minimum=0) if "id" in request.path_params else 0
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


def _lines(fields: dict[str, bytes], name: str) -> list[str]:
    """A field's lines, as ACON's daemon reads them: empty ones are none."""
    try:
        text = fields.get(name, b"").decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"form.{name}", "must be UTF-8", actual=error) from None
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
