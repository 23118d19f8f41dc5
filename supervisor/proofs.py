"""What one stage hands to the next, and nobody else can make.

Each of these is a required argument of the stage that follows: a layer cannot be
mounted that was not verified, and a process cannot be started that was not measured.
"""

from __future__ import annotations

import msgspec

from supervisor.formats.digest import Digest
from supervisor.formats.log_events import StartContainerEvent
from supervisor.sealed_type import SealedType


class StoredLayer(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that can no longer change, with their digests. Nothing has parsed them yet."""

    expected: Digest
    computed: dict[str, str]  # algorithm -> lower-case hex
    size_bytes: int
    source: str  # for humans: "upload", "oci:..."


class VerifiedLayer(metaclass=SealedType):
    """A layer whose bytes have the digest that was asked for. Made by `Layers` only."""

    def __init__(self, stored: StoredLayer) -> None:
        self.stored = stored

    @property
    def digest(self) -> Digest:
        return self.stored.expected

    @property
    def size_bytes(self) -> int:
        return self.stored.size_bytes


class Receipt(metaclass=SealedType):
    """Proof that an event is in the log and the register. Made by `Measurement` only."""

    def __init__(self, digest_sha384: str) -> None:
        self.digest_sha384 = digest_sha384


class StartReceipt(Receipt):
    """Proof that a start was measured, and with what it must agree."""

    def __init__(self, digest_sha384: str, event: StartContainerEvent) -> None:
        super().__init__(digest_sha384)
        self.event = event


class AdmissionReceipt(Receipt):
    """Proof that a group was measured."""


class SealReceipt(Receipt):
    """Proof that the seal was measured."""
