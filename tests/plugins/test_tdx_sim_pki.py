"""The simulator's PKI: kept privately, whole or not at all, and unmistakably simulated."""

from __future__ import annotations

import stat
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtensionOID, NameOID
from dcap_qvl import parse_pck_extension_from_pem

from plugins.tdx_sim import platform_identity as identity
from plugins.tdx_sim.pki import SimPki, ensure_pki
from supervisor import ConfigError

NAMES = {
    "root": "Intel SGX Root CA",
    "platform_ca": "Intel SGX PCK Platform CA",
    "pck": "Intel SGX PCK Certificate",
    "tcb_signing": "Intel SGX TCB Signing",
}


@pytest.fixture
def pki(tmp_path: Path) -> SimPki:
    return ensure_pki(tmp_path / "pki")


def test_folder_and_keys_are_for_their_owner_only(pki: SimPki) -> None:
    assert stat.S_IMODE(pki.directory.stat().st_mode) == 0o700
    keys = sorted(pki.directory.glob("*.key"))
    assert [key.stem for key in keys] == sorted(NAMES)
    for key in keys:
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_the_same_folder_gives_the_same_pki_and_another_another(
    pki: SimPki, tmp_path: Path
) -> None:
    assert ensure_pki(pki.directory).root_der == pki.root_der
    assert ensure_pki(str(tmp_path / "other")).root_der != pki.root_der


def test_an_empty_folder_is_filled_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "pki"
    folder.mkdir()
    ensure_pki(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list(tmp_path.iterdir()) == [folder]


def test_makers_at_the_same_time_agree_on_one_pki(tmp_path: Path) -> None:
    roots: list[bytes] = []
    makers = [
        threading.Thread(target=lambda: roots.append(ensure_pki(tmp_path / "pki").root_der))
        for _ in range(8)
    ]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert len(roots) == 8
    assert len(set(roots)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["pki"]


@pytest.mark.parametrize("role", sorted(NAMES))
def test_names_are_intels_and_the_rest_says_simulation(pki: SimPki, role: str) -> None:
    certificate: x509.Certificate = getattr(pki, role).certificate
    for name in (certificate.subject, certificate.issuer):
        for oid in (NameOID.ORGANIZATION_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME):
            [attribute] = name.get_attributes_for_oid(oid)
            assert "SIMULATION" in attribute.value
    [common_name] = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    assert common_name.value == NAMES[role]


def test_the_pck_certificate_has_exactly_intels_six_extensions(pki: SimPki) -> None:
    extensions = pki.pck.certificate.extensions
    assert {extension.oid.dotted_string: extension.critical for extension in extensions} == {
        ExtensionOID.AUTHORITY_KEY_IDENTIFIER.dotted_string: False,
        ExtensionOID.CRL_DISTRIBUTION_POINTS.dotted_string: False,
        ExtensionOID.SUBJECT_KEY_IDENTIFIER.dotted_string: False,
        ExtensionOID.KEY_USAGE.dotted_string: True,
        ExtensionOID.BASIC_CONSTRAINTS.dotted_string: True,
        "1.2.840.113741.1.13.1": False,
    }


def test_dcap_qvl_reads_the_sgx_extension_as_it_was_meant(pki: SimPki) -> None:
    extension = parse_pck_extension_from_pem(pki.pck_chain_pem)
    assert extension.fmspc == identity.FMSPC
    assert extension.pce_id == identity.PCE_ID
    assert extension.cpu_svn == identity.CPU_SVN
    assert extension.pce_svn == identity.PCE_SVN
    assert extension.sgx_type == 1
    assert len(extension.ppid) == 16
    assert len(extension.platform_instance_id or b"") == 16


def test_the_root_pem_is_the_root(pki: SimPki) -> None:
    assert x509.load_pem_x509_certificate(pki.root_pem_path.read_bytes()) == pki.root.certificate
    chain = x509.load_pem_x509_certificates(pki.pck_chain_pem)
    assert chain == [pki.pck.certificate, pki.platform_ca.certificate, pki.root.certificate]


def test_a_pki_of_which_a_part_is_missing_is_refused_and_not_replaced(pki: SimPki) -> None:
    (pki.directory / "pck.key").unlink()
    with pytest.raises(ConfigError, match="whole PKI"):
        ensure_pki(pki.directory)
    assert not (pki.directory / "pck.key").exists()


@pytest.mark.parametrize(("path", "mode"), [(".", 0o750), ("root.key", 0o640), ("pck.key", 0o602)])
def test_keys_that_others_could_reach_are_refused(pki: SimPki, path: str, mode: int) -> None:
    (pki.directory / path).chmod(mode)
    with pytest.raises(ConfigError) as refused:
        ensure_pki(pki.directory)
    assert refused.value.actual == f"{mode:04o}"


def test_a_key_of_another_certificate_is_refused(pki: SimPki) -> None:
    (pki.directory / "pck.key").write_bytes((pki.directory / "root.key").read_bytes())
    with pytest.raises(ConfigError) as refused:
        ensure_pki(pki.directory)
    assert refused.value.item == str(pki.directory / "pck.key")


def test_a_certificate_of_another_root_is_refused(pki: SimPki, tmp_path: Path) -> None:
    other = ensure_pki(tmp_path / "other")
    for name in ("platform_ca.pem", "platform_ca.key"):
        (pki.directory / name).write_bytes((other.directory / name).read_bytes())
    with pytest.raises(ConfigError) as refused:
        ensure_pki(pki.directory)
    assert refused.value.item == str(pki.directory / "platform_ca.pem")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "pki"):
        with pytest.raises(ConfigError) as refused:
            ensure_pki(folder)
        assert refused.value.item == str(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
