"""Evidence: one self-contained JSON file that answers one request.

REPORTDATA of the quote (64 bytes) is the 48-byte root of a Merkle tree (RFC 9162, SHA-384)
over the canonical JSON of all requests that share the quote, then 16 bytes of text that
keep it apart from whatever else a TD may have quoted.
"""

from __future__ import annotations

import msgspec

from supervisor.formats import canonical_json
from supervisor.formats.base64_text import from_base64
from supervisor.formats.digest import check_hex
from supervisor.formats.errors import FormatError
from supervisor.formats.ids import parse_image_id
from supervisor.formats.merkle import MAX_TREE_SIZE, NODE_BYTES
from supervisor.formats.status import MAX_STATUS_BYTES, decode_status
from supervisor.formats.typed_json import to_object, to_struct

EVIDENCE_FORMAT = "acon-evidence-v1"
MAX_EVIDENCE_BYTES = 64 * 1024 * 1024
MAX_REQUEST_BYTES = 16 * 1024
MAX_QUOTE_BYTES = 128 * 1024
MAX_CONFIG_BYTES = 1024 * 1024
MAX_IMAGES = 16_384
MAX_PATH_NODES = 64
MIN_NONCE_BYTES = 16
MAX_NONCE_BYTES = 64
MAX_USER_DATA_BYTES = 4096
REPORT_DATA_BYTES = 64
_REGISTERS = 4
_LOWER_HEX = frozenset("0123456789abcdef")


class RequestContainer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which container asked, through its own socket; the supervisor writes this."""

    container_id: int
    image_id: str
    start_event_digest_sha384: str


class EvidenceRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one piece of evidence answers.

    `nonce`: 16 to 64 bytes in lower-case hex. `status_digest_sha384`: hex over the status
    document. `public_key_sha384` (hex) and `user_data` (base64, at most 4,096 bytes) are
    there only if a container asked and gave them.
    """

    version: int = 1
    nonce: str
    status_digest_sha384: str
    container: RequestContainer | None = None
    public_key_sha384: str | None = None
    user_data: str | None = None


class Proof(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """That the request is in the quote's tree; `path` are nodes of 48 bytes in hex."""

    index: int
    size: int
    path: tuple[str, ...]

    @property
    def path_nodes(self) -> tuple[bytes, ...]:
        """For `merkle.verify_inclusion`."""
        return tuple(bytes.fromhex(node) for node in self.path)


class EvidenceImage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One admitted image as its owner signed it, each in base64; the certificate is DER."""

    manifest: str
    signature: str
    certificate: str


class Evidence(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`quote` and `cc_eventlog` are standard base64 under the names that CoCo gives them.

    `config` and `status` are canonical JSON as text, hashed as they stand. `images` are in
    order of admission. `rtmr_index` says which register the log was extended into.
    """

    format: str = EVIDENCE_FORMAT
    request: EvidenceRequest
    proof: Proof
    quote: str
    cc_eventlog: str
    rtmr_index: int
    config: str
    images: tuple[EvidenceImage, ...]
    status: str


def encode_request(request: EvidenceRequest) -> bytes:
    """The request's canonical JSON, absent fields left out. Raises `FormatError`."""
    item = "request"
    _check_request(to_struct(to_object(request), EvidenceRequest, item=item), item=item)
    return canonical_json.encode(_request_object(request))


def decode_request(raw: bytes) -> EvidenceRequest:
    """Strict inverse of `encode_request`."""
    item = "request"
    value = canonical_json.decode_canonical(raw, item=item, max_bytes=MAX_REQUEST_BYTES)
    request = to_struct(value, EvidenceRequest, item=item)
    _check_request(request, item=item)
    if canonical_json.encode(_request_object(request)) != raw:
        raise FormatError(item, "absent fields are left out, all others are spelt out")
    return request


def request_leaf(request: EvidenceRequest) -> bytes:
    """The leaf that stands for this request: its data, which `merkle` functions hash."""
    return encode_request(request)


def report_data_for(root: bytes) -> bytes:
    """REPORTDATA of a quote: the tree's 48-byte root, then the format's name. 64 bytes."""
    if len(root) != NODE_BYTES:
        raise FormatError("merkle root", "48 bytes", actual=len(root))
    return root + EVIDENCE_FORMAT.encode()


def _request_object(request: EvidenceRequest) -> object:
    value = to_object(request)
    if not isinstance(value, dict):
        raise TypeError("a Struct becomes an object")
    return {name: field for name, field in value.items() if field is not None}


def _evidence_object(evidence: Evidence) -> object:
    value = to_object(evidence)
    if not isinstance(value, dict):
        raise TypeError("a Struct becomes an object")
    return {**value, "request": _request_object(evidence.request)}


def encode_evidence(evidence: Evidence) -> bytes:
    """The evidence file: canonical JSON. Raises `FormatError` for what nobody could decode."""
    checked = to_struct(to_object(evidence), Evidence, item="evidence")
    _check_evidence(checked)
    raw = canonical_json.encode(_evidence_object(evidence))
    if len(raw) > MAX_EVIDENCE_BYTES:
        raise FormatError(
            "evidence", "too long", expected=f"at most {MAX_EVIDENCE_BYTES} bytes", actual=len(raw)
        )
    return raw


def decode_evidence(raw: bytes) -> Evidence:
    """Read an evidence file; its white space and order of fields are free, all else is not.

    Nothing is verified but the form: quote and log are not parsed here. Raises `FormatError`.
    """
    value = canonical_json.decode(raw, item="evidence", max_bytes=MAX_EVIDENCE_BYTES, max_depth=8)
    evidence = to_struct(value, Evidence, item="evidence")
    _check_evidence(evidence)
    # Only these two Structs have defaults, so only they have a second form.
    if not isinstance(value, dict) or "format" not in value:
        raise FormatError("evidence", "the file says its format", expected=EVIDENCE_FORMAT)
    if value["request"] != msgspec.json.decode(encode_request(evidence.request)):
        raise FormatError(
            "evidence.request", "absent fields are left out, all others are spelt out"
        )
    return evidence


def _check_request(request: EvidenceRequest, *, item: str) -> None:
    if request.version != 1:
        raise FormatError(f"{item}.version", "known version", expected=1, actual=request.version)
    nonce = request.nonce
    if not (
        2 * MIN_NONCE_BYTES <= len(nonce) <= 2 * MAX_NONCE_BYTES
        and len(nonce) % 2 == 0
        and _LOWER_HEX.issuperset(nonce)
    ):
        raise FormatError(
            f"{item}.nonce",
            "lower-case hex of 16 to 64 bytes",
            expected="32 to 128 digits",
            actual=nonce[:160],
        )
    check_hex("sha384", request.status_digest_sha384, item=f"{item}.status_digest_sha384")
    if request.container is not None:
        container = request.container
        where = f"{item}.container"
        if container.container_id < 1:
            raise FormatError(f"{where}.container_id", "from 1 on", actual=container.container_id)
        parse_image_id(container.image_id, item=f"{where}.image_id", unsafe_allow_sha256=True)
        check_hex(
            "sha384",
            container.start_event_digest_sha384,
            item=f"{where}.start_event_digest_sha384",
        )
    elif request.public_key_sha384 is not None or request.user_data is not None:
        # Otherwise whoever reaches the management API could speak for a container.
        raise FormatError(item, "only a container binds a public key or user data")
    if request.public_key_sha384 is not None:
        check_hex("sha384", request.public_key_sha384, item=f"{item}.public_key_sha384")
    if request.user_data is not None:
        _base64_within(request.user_data, MAX_USER_DATA_BYTES, item=f"{item}.user_data")


def _base64_within(text: str, max_bytes: int, *, item: str) -> bytes:
    raw = from_base64(text, item=item)
    if len(raw) > max_bytes:
        raise FormatError(item, "too long", expected=f"at most {max_bytes} bytes", actual=len(raw))
    return raw


def _check_evidence(evidence: Evidence) -> None:
    item = "evidence"
    if evidence.format != EVIDENCE_FORMAT:
        raise FormatError(
            f"{item}.format", "known format", expected=EVIDENCE_FORMAT, actual=evidence.format[:80]
        )
    _check_request(evidence.request, item=f"{item}.request")
    proof = evidence.proof
    if not 0 <= proof.index < proof.size <= MAX_TREE_SIZE or len(proof.path) > MAX_PATH_NODES:
        raise FormatError(
            f"{item}.proof",
            "a leaf inside its tree, with a path of bounded length",
            expected=f"0 <= index < size, at most {MAX_PATH_NODES} nodes",
            actual=f"{proof.index}, {proof.size}, {len(proof.path)} nodes",
        )
    for at, node in enumerate(proof.path):
        check_hex("sha384", node, item=f"{item}.proof.path[{at}]")
    if not 0 <= evidence.rtmr_index < _REGISTERS:
        raise FormatError(
            f"{item}.rtmr_index", "no such register", expected="0 to 3", actual=evidence.rtmr_index
        )
    _base64_within(evidence.quote, MAX_QUOTE_BYTES, item=f"{item}.quote")
    from_base64(evidence.cc_eventlog, item=f"{item}.cc_eventlog")
    config = canonical_json.decode_canonical(
        _utf8(evidence.config, item=f"{item}.config"),
        item=f"{item}.config",
        max_bytes=MAX_CONFIG_BYTES,
    )
    if not isinstance(config, dict):
        raise FormatError(f"{item}.config", "a configuration is an object")
    if len(evidence.images) > MAX_IMAGES:
        raise FormatError(
            f"{item}.images", "too many", expected=MAX_IMAGES, actual=len(evidence.images)
        )
    for at, image in enumerate(evidence.images):
        where = f"{item}.images[{at}]"
        from_base64(image.manifest, item=f"{where}.manifest")
        from_base64(image.signature, item=f"{where}.signature")
        from_base64(image.certificate, item=f"{where}.certificate")
    status = _utf8(evidence.status, item=f"{item}.status")
    if len(status) > MAX_STATUS_BYTES:
        raise FormatError(f"{item}.status", "too long", actual=len(status))
    decode_status(status)


def _utf8(text: str, *, item: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise FormatError(item, "text is UTF-8, without lone surrogates") from None
