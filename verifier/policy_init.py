"""Write the policy that accepts just what one piece of evidence shows, to be read and edited."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

from cryptography import x509

from supervisor.formats.base64_text import from_base64
from supervisor.formats.delegation import resolve_layers, statements_of
from supervisor.formats.errors import FormatError, Untrusted
from supervisor.formats.evidence import Evidence, decode_evidence
from supervisor.formats.quote import Quote, parse_quote
from supervisor.formats.references import DelegatedReference, split_alias
from supervisor.formats.signature import SignedManifest
from verifier.collateral import read_collateral
from verifier.images import ImageSet, names_of, read_images, subject_of
from verifier.inert_text import inert
from verifier.log_reading import SupervisorLog, read_log
from verifier.policy import UNPINNED
from verifier.supervisor_check import unsafe_settings
from verifier.trust import INTEL_ROOT_KEY_SHA384, read_root

_HEAD = """\
# A policy for `acon verify`, written from one piece of evidence.
#
# NOTHING here was verified: it repeats what that evidence claims. Read every line, and
# compare each digest with one that you know from elsewhere (your own build, `acon plan`,
# the vendor's page). Wherever you cannot, write "unpinned": the verdict will then say
# what remains to be believed, instead of claiming that nothing else runs.
"""


def policy_from_evidence(
    evidence_bytes: bytes,
    *,
    collateral: str | None = None,
    trust_root: Literal["intel", "simulated"] | None = None,
    follow_vendors: bool = False,
) -> str:
    """TOML with comments. `parse_policy` reads it, and this evidence satisfies it, unless its log
    holds two different `Start`s: only the last form of the supervisor is expected then.

    With `collateral` (JSON) the TCB evaluation number is pinned to it. `trust_root` is read
    off the quote's own root certificate when None: a claim like all others here.
    `follow_vendors` expects images that lend layers by signer, name and minimum version
    instead of by id, so that a vendor's update needs no new policy.

    Raises `FormatError` for evidence that cannot be read, or whose images do not verify.
    """
    evidence = decode_evidence(evidence_bytes)
    quote = parse_quote(from_base64(evidence.quote, item="evidence.quote"))
    log = read_log(
        from_base64(evidence.cc_eventlog, item="evidence.cc_eventlog"),
        rtmr_index=evidence.rtmr_index,
    )
    if not log.starts:
        raise FormatError("evidence", "a log without a Start names no supervisor to expect")
    images = read_images(evidence.images, allow_sha256=True)
    admitted = [_require(images, image_id) for image_id in dict.fromkeys(log.admitted())]
    if not any(signed.manifest.is_executable for signed in admitted):
        raise FormatError("evidence", "no program was admitted that a policy could expect")
    number = None if collateral is None else read_collateral(collateral).evaluation_number
    sections = (
        _trust(trust_root or _root_kind(quote), number),
        _td(quote),
        _base(quote, evidence.rtmr_index),
        _log(log, evidence.rtmr_index),
        _supervisor(log),
        _config(evidence, log),
        _images(admitted, follow_vendors=follow_vendors),
        _delegations(log, admitted),
    )
    return _HEAD + "".join("\n" + "\n".join(section) + "\n" for section in sections)


def _require(images: ImageSet, image_id: str) -> SignedManifest:
    signed = images.get(image_id)
    if signed is None:
        reasons = "; ".join(str(broken.error) for broken in images.broken)
        raise FormatError(
            "evidence.images",
            "an admitted image is missing, or its signature does not hold",
            expected=image_id,
            actual=reasons or "not there",
        )
    return signed


def _root_kind(quote: Quote) -> Literal["intel", "simulated"]:
    pem = quote.auth.certificate_chain_pem.rstrip(b"\0")
    try:
        root = x509.load_pem_x509_certificates(pem)[-1]
    except (ValueError, IndexError):
        return "intel"
    from cryptography.hazmat.primitives.serialization import Encoding

    try:
        key = read_root(root.public_bytes(Encoding.PEM)).anchor.public_key_sha384
    except FormatError:
        return "intel"
    return "intel" if key == INTEL_ROOT_KEY_SHA384 else "simulated"


def _trust(root: str, evaluation_number: int | None) -> Iterator[str]:
    yield "version = 1"
    yield ""
    yield "[trust]"
    if root == "simulated":
        yield "# SIMULATION: a quote of the software TD. It proves nothing about hardware, and"
        yield "# `acon verify` still wants its root (--trust-simulated-root)."
    yield f"root = {_toml(root)}"
    yield ""
    yield "[tcb]"
    yield "# The platform's security updates: only this state is good enough."
    yield 'accept_status = ["UpToDate"]'
    yield "# Raise it to refuse platforms judged by an older set of known weaknesses."
    number = _toml(UNPINNED) if evaluation_number is None else str(evaluation_number)
    yield f"minimum_evaluation_number = {number}"


def _td(quote: Quote) -> Iterator[str]:
    body = quote.body
    yield "[td]"
    yield "# Debugging, migration and profiling are refused whatever stands here."
    yield f"attributes = {_toml(body.td_attributes.hex())}"
    yield f"xfam = {_toml(body.xfam.hex())}"
    yield "# The TDX module. Intel's updates change it, and the TCB status judges it."
    yield f"mr_seam = {_toml(body.mr_seam.hex())}"
    if any(body.mr_signer_seam):
        yield f"mr_signer_seam = {_toml(body.mr_signer_seam.hex())}"


def _base(quote: Quote, rtmr_index: int) -> Iterator[str]:
    body = quote.body
    yield "[base]"
    yield "# Firmware; its settings; boot loader and kernel; command line and initial files."
    yield "# They decide what the supervisor runs on: without them, nothing above is sure."
    yield f"mr_td = {_toml(body.mr_td.hex())}"
    for index in range(3):
        value = UNPINNED if index == rtmr_index else body.rtmrs[index].hex()
        yield f"rtmr{index} = {_toml(value)}"
    yield "# Chosen by the host; they mean something only if you know what they should be."
    yield f"mr_config_id = {_toml(body.mr_config_id.hex())}"
    yield f"mr_owner = {_toml(body.mr_owner.hex())}"
    yield f"mr_owner_config = {_toml(body.mr_owner_config.hex())}"


def _log(log: SupervisorLog, rtmr_index: int) -> Iterator[str]:
    yield "[log]"
    yield f"register_index = {rtmr_index}"
    if any(log.at_start):
        yield (
            "# What boot loader and kernel measured into it before the supervisor."
            if rtmr_index == 2
            else "# WARNING: something was measured into the register BEFORE the supervisor."
        )
        yield f"register_at_start = {_toml(log.at_start.hex())}"
    if not log.sealed:
        yield "# WARNING: this TD was not sealed: more images can be loaded into it later."
    yield f"seal_required = {str(log.sealed).lower()}"


def _supervisor(log: SupervisorLog) -> Iterator[str]:
    _, last = log.starts[-1]
    if len(log.starts) > 1:
        yield "# WARNING: the supervisor changed while the TD ran; only its last form is"
        yield "# expected here, so this evidence itself will not pass."
    for component in last.components:
        yield "[supervisor]" if component.role == "supervisor" else "[[plugins]]"
        yield f"name = {_toml(component.name)}"
        yield f"version = {_toml(component.version)}"
        yield f"digest_sha384 = {_toml(component.digest_sha384)}"
        yield ""


def _config(evidence: Evidence, log: SupervisorLog) -> Iterator[str]:
    yield "[config]"
    yield "# The supervisor's effective configuration; its text is in the evidence."
    yield f"digest_sha384 = {_toml(log.starts[-1][1].config_digest_sha384)}"
    if unsafe := unsafe_settings(evidence.config):
        yield "# WARNING: each of these turns a check off."
        yield f"allow_unsafe = [{', '.join(map(_toml, unsafe))}]"


def _images(admitted: Iterable[SignedManifest], *, follow_vendors: bool) -> Iterator[str]:
    yield "[images]"
    yield "# Exactly these, nothing else. An image can also be expected by signer, name and"
    yield "# minimum_svn instead of by id; then its owner can update it."
    yield "exact = true"
    for signed in admitted:
        executable = signed.manifest.is_executable
        yield ""
        yield f"# {_comment(', '.join(names_of(signed)) or 'no name')}"
        yield f"# signed by {_comment(subject_of(signed))}"
        yield "[[images.executable]]" if executable else "[[images.layer_only]]"
        named = _highest_named(signed)
        if follow_vendors and not executable and named is not None:
            name, svn = named
            yield f"signer = {_toml(str(signed.signer))}"
            yield f"name = {_toml(name)}"
            yield f"minimum_svn = {svn}"
        else:
            yield f"id = {_toml(str(signed.image_id))}"


def _highest_named(signed: SignedManifest) -> tuple[str, int] | None:
    """The first name that the image has with a version, and the highest one listed for it."""
    versions: dict[str, int] = {}
    for name, svn in map(split_alias, names_of(signed)):
        if svn is not None and ":" not in name:
            versions[name] = max(svn, versions.get(name, 0))
    return next(iter(versions.items()), None)


def _delegations(log: SupervisorLog, admitted: list[SignedManifest]) -> Iterator[str]:
    accepted: dict[tuple[str, str], int] = {}

    def accept(signer: str, name: str, svn: int) -> None:
        key = (signer, name)
        accepted[key] = min(svn, accepted.get(key, svn))

    for _, event in log.containers:
        for delegation in event.delegations:
            for hop in delegation.hops:
                accept(hop.signer, split_alias(hop.alias)[0], hop.svn or 0)
    statements = [statement for signed in admitted for statement in statements_of(signed)]
    for signed in admitted:
        for layer in signed.manifest.layers:
            if not (signed.manifest.is_executable and isinstance(layer, DelegatedReference)):
                continue
            name, svn = split_alias(layer.alias)
            try:
                hops = resolve_layers([layer], statements)[0].delegation
            except Untrusted:
                accept(str(layer.signer), name, svn or 0)
                continue
            for hop in hops:
                accept(hop.signer, split_alias(hop.alias)[0], hop.svn or 0)
    if not accepted:
        yield "# No layer may be left to anyone: there is no [[delegations]]."
    for (signer, name), svn in accepted.items():
        yield "# Owners left this layer to this signer, who may change it from here on."
        yield "[[delegations]]"
        yield f"signer = {_toml(signer)}"
        yield f"name = {_toml(name)}"
        yield f"minimum_svn = {svn}"
        yield ""


def _comment(text: str) -> str:
    return inert(text, max_characters=200)


def _toml(text: str) -> str:
    """A basic string, in ASCII: nothing in it can end it or the line."""
    return '"' + "".join(map(_toml_character, text)) + '"'


def _toml_character(character: str) -> str:
    code = ord(character)
    if character in '"\\' or not 0x20 <= code < 0x7F:
        return f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"
    return character
