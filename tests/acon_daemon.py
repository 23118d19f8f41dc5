"""A daemon that remembers, over its real HTTP server, and signed bundles to load into it."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import structlog
import trio
from acon_helpers import Acon, MakeLayout, Signer, tar_of
from http_fakes import FakeOperations, served

from acon.client import Client
from supervisor import (
    AdmissionResult,
    ContainerView,
    Denied,
    ImageView,
    LayerSource,
    ManifestUpload,
)
from supervisor.formats.delegation import resolve_layers, statements_of
from supervisor.formats.digest import Digest
from supervisor.formats.errors import DelegationUnresolved
from supervisor.formats.event_log import assemble_log
from supervisor.formats.evidence import (
    Evidence,
    EvidenceImage,
    EvidenceRequest,
    Proof,
    encode_evidence,
)
from supervisor.formats.launch_policy import require_admissible
from supervisor.formats.signature import SignedManifest, verify_signed_manifest

Handler = Callable[[trio.SocketStream], Awaitable[None]]


class Remembering(FakeOperations):
    """Admits what is really signed and accepted, and knows which layers came.

    Fetches nothing unless told that it may (then it believes what it is told).
    """

    def __init__(self) -> None:
        super().__init__()
        self.admitted: list[SignedManifest] = []
        self.may_fetch = False
        self.more_images: tuple[ImageView, ...] = ()  # as if they had been admitted
        self.known: tuple[ContainerView, ...] = super().containers()
        self.log_awaited = trio.Event()

    async def fetch_layer(self, expected: Digest, source: LayerSource) -> None:
        if not self.may_fetch:
            raise Denied("source", "only what the configuration names is read")
        await super().fetch_layer(expected, source)

    async def admit(self, group: Sequence[ManifestUpload]) -> AdmissionResult:
        signed = [
            verify_signed_manifest(one.manifest, one.signature, one.certificate_der)
            for one in group
        ]
        require_admissible([*self.admitted, *signed])
        result = await super().admit(group)
        self.admitted += signed
        return result

    def images(self) -> tuple[ImageView, ...]:
        statements = [one for image in self.admitted for one in statements_of(image)]
        views = []
        for image in self.admitted:
            missing = []
            for reference in image.manifest.layers:
                try:
                    (layer,) = resolve_layers([reference], statements)
                    if not self.has_layer(layer.digest):
                        missing.append(str(layer.digest))
                except DelegationUnresolved:
                    missing.append(str(reference))
            views.append(
                ImageView(
                    image_id=str(image.image_id),
                    names=image.manifest.self_aliases,
                    executable=image.manifest.is_executable,
                    missing_layers=tuple(missing),
                )
            )
        return (*views, *self.more_images)

    def manifest(self, image_id: str) -> ManifestUpload:
        for image in self.admitted:
            if str(image.image_id) == image_id:
                return ManifestUpload(
                    manifest=image.manifest_bytes,
                    signature=image.signature,
                    certificate_der=image.certificate_der,
                )
        return super().manifest(image_id)

    def containers(self) -> tuple[ContainerView, ...]:
        return self.known

    async def wait_for_log(self, container_id: int, *, after: int) -> None:
        self.log_awaited.set()
        await super().wait_for_log(container_id, after=after)

    async def evidence(self, nonce: bytes) -> bytes:
        await super().evidence(nonce)

        def text(raw: bytes) -> str:
            return base64.b64encode(raw).decode()

        return encode_evidence(
            Evidence(
                request=EvidenceRequest(nonce=nonce.hex(), status_digest_sha384="0" * 96),
                proof=Proof(index=0, size=1, path=()),
                quote=text(b"no quote"),
                cc_eventlog=text(assemble_log(None, [])),
                rtmr_index=3,
                config="{}",
                images=tuple(
                    EvidenceImage(
                        manifest=text(one.manifest_bytes),
                        signature=text(one.signature),
                        certificate=text(one.certificate_der),
                    )
                    for one in self.admitted
                ),
                status=self.status().decode(),
            )
        )


class Daemon:
    """A daemon for the commands of one test."""

    def __init__(self, operations: Remembering, socket: Path, acon: Acon) -> None:
        self.operations = operations
        self.socket = socket
        self._acon = acon

    async def acon(self, *words: object) -> int:
        # Not at the end: what stands there may be for a container's own command.
        command = [words[0], "--socket", self.socket, *words[1:]]
        return await trio.to_thread.run_sync(lambda: self._acon(*command))


@asynccontextmanager
async def running_daemon(tmp_path: Path, acon: Acon) -> AsyncIterator[Daemon]:
    operations = Remembering()
    # The server's log would otherwise stand among the commands' output.
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    try:
        async with served(operations, tmp_path) as socket:
            yield Daemon(operations, socket, acon)
    finally:
        structlog.reset_defaults()


@asynccontextmanager
async def daemon_that(handler: Handler, folder: Path) -> AsyncIterator[Client]:
    """A client of a server that does with each connection what `handler` does."""
    path = folder / "odd.sock"
    sock = trio.socket.socket(trio.socket.AF_UNIX)
    with sock:
        await sock.bind(str(path))
        sock.listen()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, handler, [trio.SocketListener(sock)])
            async with Client.over_socket(path) as client:
                yield client
            nursery.cancel_scope.cancel()


class Bundles:
    """Makes signed bundles for `acon load`."""

    def __init__(self, folder: Path, make_layout: MakeLayout, acon: Acon) -> None:
        self._folder = folder
        self._make_layout = make_layout
        self._acon = acon

    def image(self, name: str, owner: Signer, *options: object, to: str | None = None) -> Path:
        """An image of a common layer and one of its own; the common one delegated if `to`."""
        layers = [tar_of({"common": b"c" * 10_000}), tar_of({name: name.encode()})]
        layout = self._make_layout(name, layers, config={"Entrypoint": [f"/{name}"]})
        bundle = self._folder / "bundles" / name
        convert = ("image", "convert", f"oci:{layout}", "-o", bundle, "--name", f"{name}:1")
        assert self._acon(*convert, *options) == 0
        if to is not None:
            assert self._acon("image", "delegate", bundle, "--layer", 0, "--to", to) == 0
        sign = ("image", "sign", bundle, "--key", owner.key, "--cert", owner.certificate)
        assert self._acon(*sign) == 0
        return bundle

    def vendor(self, alias: str, vendor: Signer) -> Path:
        layout = self._make_layout("lent", [tar_of({"lent": b"l" * 5_000})])
        bundle = self._folder / "bundles" / "lent"
        assert self._acon("vendor", "make", f"oci:{layout}", "--alias", alias, "-o", bundle) == 0
        sign = ("vendor", "sign", bundle, "--key", vendor.key, "--cert", vendor.certificate)
        assert self._acon(*sign) == 0
        return bundle


def lines_of(text: str) -> list[dict[str, object]]:
    """The JSON lines that a command printed."""
    return [json.loads(line) for line in text.splitlines()]
