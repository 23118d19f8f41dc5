"""Compressed bytes, taken in pieces of the reader's choice."""

from __future__ import annotations

from plugins.image_store.inflate.damage import StreamDamaged

TYPE_CHECKING = False  # as in `worker`
if TYPE_CHECKING:
    from collections.abc import Iterable


class StreamInput:
    """Reads `chunks`, each at most once. `cut_short` is the rule that an early end breaks."""

    def __init__(self, chunks: Iterable[bytes], *, cut_short: str) -> None:
        self._chunks = iter(chunks)
        self._cut_short = cut_short
        self._rest = memoryview(b"")

    def some(self, most_bytes: int) -> memoryview:
        """The next bytes, at least one and at most `most_bytes`; empty at the end."""
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            self._rest = memoryview(chunk)
        taken, self._rest = self._rest[:most_bytes], self._rest[most_bytes:]
        return taken

    def some_more(self, most_bytes: int) -> memoryview:
        """As `some`; raises `StreamDamaged` at the end."""
        taken = self.some(most_bytes)
        if not taken:
            raise StreamDamaged(self._cut_short, "it ends too early")
        return taken

    def exactly(self, size_bytes: int) -> bytes:
        """The next `size_bytes` bytes. Raises `StreamDamaged` when there are fewer."""
        taken = bytearray()
        while len(taken) < size_bytes:
            taken += self.some_more(size_bytes - len(taken))
        return bytes(taken)

    def give_back(self, unused: bytes) -> None:
        """Put the end of what was taken last in front again."""
        if unused:
            self._rest = memoryview(unused + bytes(self._rest))
