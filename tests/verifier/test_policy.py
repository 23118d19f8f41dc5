"""A policy says what it means or is refused, with the path of what is wrong."""

from __future__ import annotations

import pytest
from evidence_factory import signer_id

from supervisor.formats.errors import FormatError
from verifier import parse_policy

GATEWAY = f"sha384/{'ab' * 48}/{'cd' * 48}"
TEXT = f"""\
version = 1
supervisor = "unpinned"
plugins = "unpinned"

[tcb]
minimum_evaluation_number = 17

[td]
attributes = "0000001000000000"
xfam = ["e702060000000000", "e700000000000000"]
mr_seam = "unpinned"

[base]
mr_td = "{"00" * 48}"
rtmr0 = "{"01" * 48}"
rtmr1 = "unpinned"
rtmr2 = "unpinned"
mr_config_id = "unpinned"
mr_owner = "unpinned"
mr_owner_config = "unpinned"

[config]
digest_sha384 = "unpinned"

[images]
[[images.executable]]
id = "{GATEWAY}"
[[images.layer_only]]
signer = "{signer_id("csp")}"
name = "python"
minimum_svn = 2

[[delegations]]
signer = "{signer_id("csp")}"
name = "python"
minimum_svn = 2
"""


def test_a_policy_has_the_strict_defaults() -> None:
    policy = parse_policy(TEXT)
    assert policy.trust.root == "intel"
    assert policy.tcb.accept_status == ("UpToDate",)
    assert policy.tcb.accept_advisories == ()
    assert policy.log.seal_required
    assert policy.log.register_index == 3
    assert policy.log.register_at_start == "00" * 48
    assert policy.certificates.dates == "checked"
    assert not isinstance(policy.images, str)
    assert policy.images.exact
    assert parse_policy(TEXT.encode()) == policy


REFUSED = [
    # an unknown key, wherever it stands
    ("version = 1", "version = 1\nextra = 2", "extra"),
    ("[tcb]", "[tcb]\naccept = 1", "tcb.accept"),
    ("name = ", "svn = 1\nname = ", "images.layer_only[0].svn"),
    # an expectation left out by silence
    ('mr_seam = "unpinned"\n', "", "td.mr_seam"),
    ('rtmr1 = "unpinned"\n', "", "base.rtmr1"),
    ('digest_sha384 = "unpinned"', "", "config"),
    ("minimum_evaluation_number = 17", "", "tcb"),
    ('supervisor = "unpinned"\n', "", "supervisor"),
    # an empty one
    (f'[[images.executable]]\nid = "{GATEWAY}"', "executable = []", "images.executable"),
    ("[config]", "[log]\n[config]", "log"),
    ('plugins = "unpinned"', "plugins = []", "plugins"),
    ('plugins = "unpinned"', 'plugins = ""', "plugins"),
    ("[tcb]", "[tcb]\naccept_advisories = []", "tcb.accept_advisories"),
    ("[tcb]", "[tcb]\naccept_status = []", "tcb.accept_status"),
    # a wrong type or value
    ("version = 1", "version = 2", "version"),
    ("version = 1", "version = true", "version"),
    ("minimum_evaluation_number = 17", "minimum_evaluation_number = -1", "tcb.minimum_evaluation"),
    ("minimum_evaluation_number = 17", 'minimum_evaluation_number = "none"', "tcb.minimum_eval"),
    ("[tcb]", '[tcb]\naccept_status = ["Revoked"]', "tcb.accept_status"),
    ("[tcb]", '[tcb]\naccept_status = ["UpToDate", "UpToDate"]', "tcb.accept_status"),
    ('"unpinned"\nplugins', '"pinned"\nplugins', "supervisor"),
    ("[config]", "[log]\nregister_index = 1\n[config]", "log.register_index"),
    ("[config]", '[log]\nregister_at_start = "zero"\n[config]', "log.register_at_start"),
    ("[config]", '[certificates]\ndates = "whatever"\n[config]', "certificates.dates"),
    ("[config]", '[trust]\nroot = "any"\n[config]', "trust.root"),
    ('mr_td = "0000', 'mr_td = "00', "base.mr_td"),
    ('rtmr0 = "0101', 'rtmr0 = "AB01', "base.rtmr0"),
    ('rtmr1 = "unpinned"', 'rtmr1 = ["unpinned"]', "base.rtmr1"),
    (GATEWAY, GATEWAY[:-2], "images.executable[0].id"),
    (GATEWAY, GATEWAY.replace("sha384", "sha256"), "images.executable[0].id"),
    ('name = "python"', 'name = "python:2"', "images.layer_only[0].name"),
    ('name = "python"', 'name = "a/b"', "images.layer_only[0].name"),
    ("minimum_svn = 2", "minimum_svn = -2", "images.layer_only[0].minimum_svn"),
    # contradictions
    ('attributes = "0000001000000000"', 'attributes = "0100001000000000"', "td.attributes"),
    ('attributes = "0000001000000000"', 'attributes = "0000000000000000"', "td.attributes"),
    ('"e700000000000000"', '"e700000000000080"', "td.xfam"),
    ('"e700000000000000"', '"e702060000000000"', "td.xfam"),
    (f'id = "{GATEWAY}"', f'id = "{GATEWAY}"\nname = "x"', "images.executable[0]"),
    (f'id = "{GATEWAY}"', 'name = "x"', "images.executable[0]"),
    (
        f'id = "{GATEWAY}"',
        f'id = "{GATEWAY}"\n[[images.executable]]\nid = "{GATEWAY}"',
        "images.executable[1]",
    ),
    (
        f'signer = "{signer_id("csp")}"\nname = "python"\nminimum_svn = 2\n\n',
        f'id = "{GATEWAY}"\n\n',
        "images.layer_only[0]",
    ),
    (
        "[[delegations]]",
        f'[[delegations]]\nsigner = "{signer_id("csp")}"\nname = "python"\nminimum_svn = 1\n'
        "[[delegations]]",
        "delegations[1]",
    ),
    (
        'supervisor = "unpinned"\nplugins = "unpinned"',
        'plugins = [{name="a", version="1", digest_sha384="unpinned"},'
        '{name="a", version="2", digest_sha384="unpinned"}]\nsupervisor = "unpinned"',
        "plugins[1].name",
    ),
    (
        'plugins = "unpinned"',
        'plugins = [{name="unpinned", version="1", digest_sha384="unpinned"}]',
        "plugins[0].name",
    ),
]


@pytest.mark.parametrize(("before", "after", "path"), REFUSED)
def test_a_policy_that_means_nothing_is_refused_with_its_path(
    before: str, after: str, path: str
) -> None:
    assert before in TEXT
    with pytest.raises(FormatError) as refused:
        parse_policy(TEXT.replace(before, after, 1))
    assert refused.value.item.startswith(path)
    assert refused.value.rule


def test_the_logs_own_register_cannot_be_pinned_as_the_base_too() -> None:
    with pytest.raises(FormatError) as refused:
        parse_policy(
            TEXT.replace('rtmr2 = "unpinned"', f'rtmr2 = "{"02" * 48}"').replace(
                "[config]", "[log]\nregister_index = 2\n[config]"
            )
        )
    assert refused.value.item == "base.rtmr2"


@pytest.mark.parametrize(
    "text",
    [b"\xff\xfe", "version = ", "a = " + "[" * 5000, "x" * (1 << 20 | 1), ""],
    ids=["not UTF-8", "not TOML", "deep", "large", "empty"],
)
def test_what_is_no_policy_at_all_is_a_format_error(text: str | bytes) -> None:
    with pytest.raises(FormatError):
        parse_policy(text)


def test_sha256_ids_are_read_only_where_the_setting_is_allowed() -> None:
    weak = f"sha256/{'ab' * 32}/{'cd' * 32}"
    text = TEXT.replace(GATEWAY, weak)
    allowed = text.replace("[config]", '[config]\nallow_unsafe = ["admission.unsafe_allow_sha256"]')
    assert str(parse_policy(allowed).images).count(weak) == 1
    with pytest.raises(FormatError):
        parse_policy(text)
