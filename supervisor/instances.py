"""How many containers there may be: of one image, and of all together."""

from __future__ import annotations

from collections import Counter

from supervisor.admission import AdmittedImage
from supervisor.errors import Busy, Conflict


class Instances:
    """Counts what is reserved. A manifest's `maxInstances` bounds what runs of its image,
    `containers.max_running` what all of them hold of the machine."""

    def __init__(self, max_running: int) -> None:
        self._max_running = max_running
        self._of_image: Counter[str] = Counter()
        self._held = 0

    def reserve(self, image: AdmittedImage) -> Instance:
        """One more, from before its start is decided. Raises `Conflict` or `Busy`."""
        limit = image.signed.manifest.max_instances
        if limit and self._of_image[image.image_id] >= limit:
            raise Conflict(
                image.image_id,
                "has as many containers as its manifest's maxInstances allows",
                expected=f"at most {limit}",
                actual=self._of_image[image.image_id] + 1,
            )
        if self._held >= self._max_running:
            raise Busy(
                image.image_id,
                "too many containers run (containers.max_running)",
                expected=f"at most {self._max_running}",
            )
        return Instance(self, image.image_id)

    def _count(self, image_id: str, *, runs: int, held: int) -> None:
        self._of_image[image_id] += runs
        if not self._of_image[image_id]:
            del self._of_image[image_id]
        self._held += held


class Instance:
    """One reserved place. Whoever holds it must `free` it."""

    def __init__(self, instances: Instances, image_id: str) -> None:
        self._instances = instances
        self._image_id = image_id
        self._runs = self._held = True
        instances._count(image_id, runs=1, held=1)

    def end(self) -> None:
        """It runs no more: another of its image may, while this one is cleared away."""
        if self._runs:
            self._runs = False
            self._instances._count(self._image_id, runs=-1, held=0)

    def free(self) -> None:
        """It is cleared away. Idempotent; ends it too."""
        self.end()
        if self._held:
            self._held = False
            self._instances._count(self._image_id, runs=0, held=-1)
