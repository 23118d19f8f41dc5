"""What a policy's values must be by themselves and beside each other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from supervisor.formats.errors import FormatError, Untrusted
from supervisor.formats.ids import parse_image_id, parse_signer_id
from supervisor.formats.references import MAX_SVN, valid_alias
from verifier.policy import (
    UNPINNED,
    ComponentPolicy,
    DelegationEntry,
    ImageEntry,
    Pins,
    Policy,
    pins,
)
from verifier.td_bits import attribute_problems, xfam_problems

MAX_ENTRIES = 512
_HEX = re.compile(r"[0-9a-f]+")


def require_consistent(policy: Policy) -> None:
    """Refuse malformed, duplicate and contradictory settings with their path (`FormatError`)."""
    _check_measurements(policy)
    _check_components(policy)
    weak = allows_sha256(policy)
    _check_images(policy, weak)
    if not isinstance(policy.delegations, str):
        _check_delegations(policy.delegations, weak)
    if isinstance(policy.speaker, ImageEntry):
        _check_entry(policy.speaker, "speaker", weak)
    number = policy.tcb.minimum_evaluation_number
    if isinstance(number, int):
        _in_range(number, "tcb.minimum_evaluation_number")
    _distinct(policy.tcb.accept_status, "tcb.accept_status")
    if not isinstance(policy.tcb.accept_advisories, str):
        _distinct(policy.tcb.accept_advisories, "tcb.accept_advisories")


def allows_sha256(policy: Policy) -> bool:
    """Whether the policy's author accepted a supervisor that accepts SHA-256 images."""
    return any(
        path.rpartition(".")[2] == "unsafe_allow_sha256" for path in policy.config.allow_unsafe
    )


def _check_measurements(policy: Policy) -> None:
    base, td = policy.base, policy.td
    for name in base.__struct_fields__:
        _check_pins(getattr(base, name), f"base.{name}", 48)
    _check_pins(td.mr_seam, "td.mr_seam", 48)
    _check_hex(td.mr_signer_seam, "td.mr_signer_seam", 48)
    _check_pins(policy.config.digest_sha384, "config.digest_sha384", 48)
    _check_hex(policy.log.register_at_start, "log.register_at_start", 48)
    if policy.log.register_index == 2 and policy.base.rtmr2 != UNPINNED:
        raise FormatError(
            "base.rtmr2",
            "the register of the supervisor's log changes with it, so it is pinned by the log",
            expected='"unpinned", since log.register_index = 2',
            actual="a pinned value",
        )
    _check_bits(td.attributes, "td.attributes", attribute_problems)
    _check_bits(td.xfam, "td.xfam", xfam_problems)


def _check_bits(value: Pins, path: str, problems: Callable[[bytes], tuple[str, ...]]) -> None:
    _check_pins(value, path, 8)
    for pinned in pins(value) or ():
        for problem in problems(bytes.fromhex(pinned)):
            raise FormatError(
                path, f"contradicts a rule that always holds: {problem}", actual=pinned
            )


def _check_pins(value: Pins, path: str, size_bytes: int) -> None:
    values = pins(value)
    if values is None:
        return
    _distinct(values, path)
    for one in values:
        if one == UNPINNED:
            raise FormatError(
                path, "a list of values with the word for none among them", actual=one
            )
        _check_hex(one, path, size_bytes)


def _check_hex(text: str, path: str, size_bytes: int) -> None:
    if len(text) != 2 * size_bytes or not _HEX.fullmatch(text):
        raise FormatError(
            path,
            "a measurement is written in lower-case hex",
            expected=f"{2 * size_bytes} hex digits",
            actual=text[:120],
        )


def _check_components(policy: Policy) -> None:
    expected: list[tuple[str, ComponentPolicy]] = []
    if isinstance(policy.supervisor, ComponentPolicy):
        expected.append(("supervisor", policy.supervisor))
    if not isinstance(policy.plugins, str):
        expected += [(f"plugins[{index}]", plugin) for index, plugin in enumerate(policy.plugins)]
    named: dict[str, str] = {}
    for where, component in expected:
        if component.name == UNPINNED:
            raise FormatError(f"{where}.name", "a component without a name is no expectation")
        if component.digest_sha384 != UNPINNED:
            _check_hex(component.digest_sha384, f"{where}.digest_sha384", 48)
        if component.name in named:
            raise FormatError(
                f"{where}.name",
                f"already expected as {named[component.name]}",
                actual=component.name,
            )
        named[component.name] = where


def _check_images(policy: Policy, weak: bool) -> None:
    if isinstance(policy.images, str):
        return
    seen: dict[tuple[object, ...], str] = {}
    for kind in ("executable", "layer_only"):
        entries: Sequence[ImageEntry] = getattr(policy.images, kind)
        if len(entries) > MAX_ENTRIES:
            raise FormatError(
                f"images.{kind}", "too many", expected=f"at most {MAX_ENTRIES}", actual=len(entries)
            )
        for index, entry in enumerate(entries):
            where = f"images.{kind}[{index}]"
            _check_entry(entry, where, weak)
            key = (entry.id,) if entry.id is not None else (kind, entry.signer, entry.name)
            if key in seen:
                raise FormatError(where, f"already expected by {seen[key]}", actual=str(entry))
            seen[key] = where


def _check_entry(entry: ImageEntry, where: str, weak: bool) -> None:
    by_name = (entry.signer, entry.name, entry.minimum_svn)
    if entry.id is not None:
        if by_name != (None, None, None):
            raise FormatError(
                where,
                "an image is expected by id, or by signer, name and minimum_svn; not by both",
                actual=str(entry),
            )
        image_id = entry.id
        _reparse(f"{where}.id", lambda: parse_image_id(image_id, unsafe_allow_sha256=weak))
        return
    if entry.signer is None or entry.name is None or entry.minimum_svn is None:
        raise FormatError(
            where,
            "an image is expected by id, or by signer, name and minimum_svn",
            expected="id; or signer, name, minimum_svn (0: any)",
            actual=", ".join(
                key for key in ("signer", "name", "minimum_svn") if getattr(entry, key) is not None
            ),
        )
    _check_named(entry.signer, entry.name, entry.minimum_svn, where, weak)


def _check_named(signer: str, name: str, minimum_svn: int, where: str, weak: bool) -> None:
    _reparse(f"{where}.signer", lambda: parse_signer_id(signer, unsafe_allow_sha256=weak))
    if ":" in name or not valid_alias(name):
        raise FormatError(
            f"{where}.name",
            "an alias without its SVN, which goes into minimum_svn",
            expected="a file name without : and /",
            actual=name[:120],
        )
    _in_range(minimum_svn, f"{where}.minimum_svn")


def _check_delegations(entries: Sequence[DelegationEntry], weak: bool) -> None:
    for index, entry in enumerate(entries):
        where = f"delegations[{index}]"
        _check_named(entry.signer, entry.name, entry.minimum_svn, where, weak)
        for earlier in entries[:index]:
            if (earlier.signer, earlier.name) == (entry.signer, entry.name):
                raise FormatError(where, "already accepted further up", actual=str(entry))


def _reparse(path: str, parse: Callable[[], object]) -> None:
    try:
        parse()
    except Untrusted as error:
        raise FormatError(path, error.rule, expected=error.expected, actual=error.actual) from None


def _in_range(number: int, path: str) -> None:
    if not 0 <= number <= MAX_SVN:
        raise FormatError(path, "out of range", expected=f"0 to {MAX_SVN}", actual=number)


def _distinct(values: Iterable[str], path: str) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise FormatError(path, "the same value twice", actual=value)
        seen.add(value)
