"""How one talks to the software TD: one request and one reply per connection of a Unix
stream socket, each a frame of a big-endian u32 length and that many bytes of JSON.

One request per connection, because then nothing that one client does, vanishing in the
middle included, can put another one's answer out of step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from plugins.tdx_sim.firmware import BaseImage

HEADER_BYTES = 4
MAX_REQUEST_BYTES = 128 * 1024  # a boot with four sentences of 4096 escaped characters
MAX_REPLY_BYTES = 1024 * 1024  # far above a quote (8 KiB) or a log

QuoteVersion = Literal[4, 5]
_RtmrIndex = Annotated[int, msgspec.Meta(ge=0, le=3)]


class _Message(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"
):
    """Bytes travel as base64."""


# --- requests ------------------------------------------------------------------------------


class Describe(_Message, frozen=True, kw_only=True, tag="describe"):
    """Answered with `Description`."""


class ReadRegister(_Message, frozen=True, kw_only=True, tag="read_register"):
    """Answered with `Blob`, 48 bytes."""

    rtmr_index: _RtmrIndex


class ExtendRegister(_Message, frozen=True, kw_only=True, tag="extend_register"):
    """Answered with `Done`. Not idempotent."""

    rtmr_index: _RtmrIndex
    digest_sha384: bytes


class MakeTdReport(_Message, frozen=True, kw_only=True, tag="td_report"):
    """Answered with `Blob`, 1,024 bytes."""

    report_data: bytes


class MakeQuote(_Message, frozen=True, kw_only=True, tag="quote"):
    """Answered with `Blob`, after the quote delay."""

    report_data: bytes
    version: QuoteVersion = 4


class ReadBootLog(_Message, frozen=True, kw_only=True, tag="ccel"):
    """Answered with `Blob`."""


class Boot(_Message, frozen=True, kw_only=True, tag="boot"):
    """Boot again, with another base image if one is given. Answered with `Description`.

    The host's to ask, not the guest's: refused (EPERM) except on the owner's socket.
    """

    base_image: BaseImage | None = None


Request = Describe | ReadRegister | ExtendRegister | MakeTdReport | MakeQuote | ReadBootLog | Boot

# --- replies -------------------------------------------------------------------------------


class Done(_Message, frozen=True, kw_only=True, tag="done"):
    """It happened."""


class Blob(_Message, frozen=True, kw_only=True, tag="blob"):
    """What was asked for."""

    data: bytes


class Description(_Message, frozen=True, kw_only=True, tag="description"):
    """The TD as it is now. Registers are lower-case hex; `boots` counts from 1."""

    platform: Literal["SIMULATION"] = "SIMULATION"
    boots: int
    base_image: BaseImage
    mr_td: str
    rtmrs: tuple[str, str, str, str]
    td_attributes: str
    xfam: str
    root_certificate_sha256: str


class Failure(_Message, frozen=True, kw_only=True, tag="failure"):
    """It did not happen. `error` is the name of the errno that hardware would give."""

    error: str
    message: str


Reply = Done | Blob | Description | Failure

_encoder = msgspec.json.Encoder()
_request_decoder: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_reply_decoder: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(Reply)


def owner_socket_path(socket_path: Path | str) -> Path:
    """The host's side of the TD that serves its guest at `socket_path`."""
    path = Path(socket_path)
    return path.with_name(path.name + ".owner")


def pack(message: Request | Reply) -> bytes:
    """The whole frame."""
    body = _encoder.encode(message)
    return len(body).to_bytes(HEADER_BYTES, "big") + body


def body_size(header: bytes, *, limit_bytes: int) -> int:
    """The length that a frame's header states. Raises `ValueError` above the limit."""
    size = int.from_bytes(header, "big")
    if size > limit_bytes:
        raise ValueError(f"a frame has at most {limit_bytes} bytes, this one {size}")
    return size


def parse_request(body: bytes) -> Request:
    """Raises `ValueError` (msgspec's errors are) for anything but one whole request."""
    return _request_decoder.decode(body)


def parse_reply(body: bytes) -> Reply:
    """Raises `ValueError` for anything but one whole reply."""
    return _reply_decoder.decode(body)
