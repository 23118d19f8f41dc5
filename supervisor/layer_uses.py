"""Which admitted images use which layers: what is let in, how much of it, and what is let go.

Images are only ever added, but what delegated layers mean changes with every vendor image.
So when images were added, they and those with delegated layers are looked at, and no others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from supervisor.admission import Admission, AdmittedImage
from supervisor.errors import DelegationUnresolved, Untrusted
from supervisor.formats.digest import Digest


class LayerUses:
    """Follows an `Admission`: every answer is by what is admitted when it is asked."""

    def __init__(self, admission: Admission, *, max_image_bytes: int) -> None:
        self._admission = admission
        self._max_image_bytes = max_image_bytes
        self._counted = 0
        self._layers: dict[str, frozenset[Digest]] = {}
        self._users: dict[Digest, list[str]] = {}
        self._delegating: list[AdmittedImage] = []
        # How many executable images need a layer; those that were needed once.
        self._needs: Counter[Digest] = Counter()
        self._ever_needed: set[Digest] = set()

    def is_named(self, layer: Digest) -> bool:
        """Whether an admitted image names the layer: pinned, or as what an alias stands for."""
        self._follow()
        return layer in self._users

    def superseded(self) -> frozenset[Digest]:
        """Layers that an executable image once pinned or resolved to, and none does any more.

        What only a vendor's image names, and nobody resolved to yet, is not among them: its
        users may still come.
        """
        self._follow()
        return frozenset(layer for layer in self._ever_needed if not self._needs[layer])

    def require_room(
        self, layer: Digest, size_bytes: int, held_bytes: Mapping[Digest, int]
    ) -> None:
        """Judge `size_bytes` more (uncompressed) beside what is held, for every image that
        names the layer or resolves to it.

        Raises `Untrusted` that names the first image whose layers would be too large.
        """
        self._follow()
        for image_id in self._users.get(layer, ()):
            # An image that only lends the layer under an alias never mounts it with others.
            beside = self._layers[image_id] - {layer} if layer in self._layers[image_id] else ()
            total_bytes = size_bytes + sum(held_bytes.get(other, 0) for other in beside)
            self._require_bounded(image_id, total_bytes, f"with {layer}")

    def require_bounded(self, image_id: str, layers: Iterable[tuple[Digest, int]]) -> None:
        """Judge layers, with their sizes in bytes, that one image is to be started from.

        Where each of them was here before the image, or before a vendor's image gave its
        references this meaning, no arrival was there to be refused. Raises `Untrusted`.
        """
        self._require_bounded(image_id, sum(dict(layers).values()), "in all its layers")

    def _require_bounded(self, image_id: str, total_bytes: int, which: str) -> None:
        if total_bytes > self._max_image_bytes:
            raise Untrusted(
                image_id,
                "all layers of an image together have a bounded size (layers.max_image_bytes)",
                expected=f"at most {self._max_image_bytes} bytes",
                actual=f"{total_bytes} bytes {which}",
            )

    def _follow(self) -> None:
        images = self._admission.images()
        added = images[self._counted :]
        if not added:
            return
        self._counted = len(images)
        for image in self._delegating:
            self._use(image, self._layers_of(image))
        for image in added:
            for layer in _lent(image):
                self._users.setdefault(layer, []).append(image.image_id)
            self._use(image, self._layers_of(image))
            if any(not isinstance(one, Digest) for one in image.signed.manifest.layers):
                self._delegating.append(image)

    def _use(self, image: AdmittedImage, layers: frozenset[Digest]) -> None:
        """From now on it is these that the image is made of."""
        before = self._layers.get(image.image_id, frozenset())
        lent = _lent(image)
        for layer in before - layers - lent:
            self._users[layer].remove(image.image_id)
            if not self._users[layer]:
                del self._users[layer]
        for layer in layers - before - lent:
            self._users.setdefault(layer, []).append(image.image_id)
        self._layers[image.image_id] = layers
        if image.signed.manifest.is_executable:
            self._needs.subtract(before - layers)
            self._needs.update(layers - before)
            self._ever_needed |= layers

    def _layers_of(self, image: AdmittedImage) -> frozenset[Digest]:
        """Those that it pins and those that its delegated references mean now."""
        found = set()
        for reference in image.signed.manifest.layers:
            try:
                found.add(self._admission.resolver.layer(reference).digest)
            except DelegationUnresolved:
                continue  # a vendor's image may still come, and give it a meaning
        return frozenset(found)


def _lent(image: AdmittedImage) -> frozenset[Digest]:
    aliases = image.signed.manifest.content_aliases
    return frozenset(target for target, _ in aliases if isinstance(target, Digest))
