"""What is decided about a start, judged and measured, before anything of it happens."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from supervisor.admission import Admission, AdmittedImage
from supervisor.errors import Busy, PolicyDenied, Refusal
from supervisor.events import ContainerStarting
from supervisor.formats.delegation import resolve_layers
from supervisor.formats.environment import resolve_environment
from supervisor.formats.log_events import start_container_event
from supervisor.formats.manifest import Manifest
from supervisor.layers import Layers
from supervisor.measurement import Measurement
from supervisor.plugin_host import PluginHost
from supervisor.proofs import StartReceipt, VerifiedLayer

# Each round lost means that a vendor's newer image was admitted meanwhile.
START_ROUNDS = 8
# user_namespaces(7): a map has at most 340 lines, and one of them is for id 0.
MAX_UIDS = 339


class MeasuredStart(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was decided about a start, and the receipt that it is in the log."""

    image: AdmittedImage
    layers: tuple[VerifiedLayer, ...]
    receipt: StartReceipt


class Starting:
    """From an admitted image to the receipt without which nothing starts."""

    def __init__(
        self, *, admission: Admission, layers: Layers, measurement: Measurement, host: PluginHost
    ) -> None:
        self._admission = admission
        self._layers = layers
        self._measurement = measurement
        self._host = host

    async def measure(self, image: AdmittedImage, requested: Sequence[str]) -> MeasuredStart:
        """Resolve, judge and record a start with the requested environment rules.

        Raises `Conflict`, `PolicyDenied`, `DelegationUnresolved`, `Denied`, `Busy` or
        `MeasurementHalted`. Cancelled, it may have been recorded.
        """
        manifest = image.signed.manifest
        _require_startable(image.image_id, manifest)
        environment = resolve_environment(manifest.env, requested)
        for _ in range(START_ROUNDS):
            resolved = resolve_layers(manifest.layers, self._admission.statements)
            self._layers.require((layer.digest for layer in resolved), item=image.image_id)
            event = ContainerStarting(
                image_id=image.image_id,
                layers=resolved,
                argv=manifest.entrypoint,
                environment=environment,
            )
            await self._host.judge("judge_start", event, item=image.image_id)
            async with self._measurement.writing() as writer:
                # The verifier resolves at this place in the log: what was judged must
                # still be what the log so far resolves to.
                if resolve_layers(manifest.layers, self._admission.statements) != resolved:
                    continue
                # Looked up here, so that what is mounted is what is here when it is recorded.
                layers = self._layers.require(
                    (layer.digest for layer in resolved), item=image.image_id
                )
                receipt = await writer.record_container(
                    start_container_event(
                        event.image_id, event.layers, event.argv, event.environment
                    )
                )
            return MeasuredStart(image=image, layers=layers, receipt=receipt)
        raise Busy(image.image_id, "its delegated layers keep changing")


def _require_startable(image_id: str, manifest: Manifest) -> None:
    if not manifest.is_executable:
        raise PolicyDenied(image_id, "has no entry point: it only lends layers")
    if not manifest.layers:
        raise PolicyDenied(image_id, "has an entry point but no layer to run it from")
    if len(manifest.uids) > MAX_UIDS:
        raise PolicyDenied(
            image_id,
            "asks for more ids than a user namespace maps one by one",
            expected=f"at most {MAX_UIDS}",
            actual=len(manifest.uids),
        )


def missing_layers(image: AdmittedImage, admission: Admission, layers: Layers) -> tuple[str, ...]:
    """What still keeps an image from starting: digests that are not here, and delegated
    references that nothing resolves yet."""
    missing = []
    for reference in image.signed.manifest.layers:
        try:
            resolved = admission.resolver.layer(reference)
        except Refusal:
            missing.append(str(reference))
            continue
        if not layers.has(resolved.digest):
            missing.append(str(resolved.digest))
    return tuple(dict.fromkeys(missing))
