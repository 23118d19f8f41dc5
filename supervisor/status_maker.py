"""The status document of the moment: what is admitted and what runs, as evidence binds it."""

from __future__ import annotations

from supervisor.admission import Admission
from supervisor.containers import Containers
from supervisor.errors import RuntimeFailed
from supervisor.formats.errors import FormatError
from supervisor.formats.status import (
    MEASUREMENT_HALTED_PREFIX,
    MEASUREMENT_OK,
    ImageStatus,
    Status,
    encode_status,
)
from supervisor.layers import Layers
from supervisor.measurement import Measurement
from supervisor.operations import ImageView
from supervisor.starting import missing_layers


class StatusMaker:
    """Reads the parts of the supervisor in one step, so that no status is half of a change.

    `runtime_notes` are the container runtime's sentences: what it ended, what it cannot limit.
    """

    def __init__(
        self,
        *,
        measurement: Measurement,
        admission: Admission,
        layers: Layers,
        containers: Containers,
        runtime_notes: tuple[str, ...],
    ) -> None:
        self._measurement = measurement
        self._admission = admission
        self._layers = layers
        self._containers = containers
        self._runtime_notes = runtime_notes

    def images(self) -> tuple[ImageView, ...]:
        """In order of admission."""
        return tuple(
            ImageView(
                image_id=image.image_id,
                names=image.signed.manifest.self_aliases,
                executable=image.signed.manifest.is_executable,
                missing_layers=missing_layers(image, self._admission, self._layers),
            )
            for image in self._admission.images()
        )

    def status(self) -> Status:
        """Now."""
        halted = self._measurement.halted
        return Status(
            sealed=self._admission.sealed,
            measurement=(
                MEASUREMENT_OK if halted is None else f"{MEASUREMENT_HALTED_PREFIX}{halted}"
            ),
            images=tuple(
                ImageStatus(
                    image_id=view.image_id,
                    names=view.names,
                    executable=view.executable,
                    missing_layers=view.missing_layers,
                )
                for view in self.images()
            ),
            containers=self._containers.statuses(),
            notes=self._measurement.notes + self._runtime_notes,
        )

    def encoded(self) -> bytes:
        """Now, as the document that a verifier reads. Raises `RuntimeFailed` if none could."""
        try:
            return encode_status(self.status())
        except FormatError as error:
            # Ours, not the asker's.
            raise RuntimeFailed("status", "cannot be written", actual=error) from error
