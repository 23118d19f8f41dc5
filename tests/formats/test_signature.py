from __future__ import annotations

import copy
import hashlib
import json
import pickle
from functools import cache
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import (
    dsa,
    ec,
    ed448,
    ed25519,
    padding,
    rsa,
    utils,
)
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from hypothesis import given, settings
from hypothesis import strategies as st
from signed_images import SignerKey, certificate_der, image, manifest_bytes, signer

from supervisor.formats.canonical_json import encode, encode_go
from supervisor.formats.errors import FormatError, Refusal, SignatureInvalid
from supervisor.formats.signature import (
    MAX_CERTIFICATE_BYTES,
    MAX_SIGNATURE_BYTES,
    SignedManifest,
    certificate_hash_algorithm,
    matching_form,
    sign_manifest,
    signer_id_of,
    verify_signed_manifest,
)

RAW = manifest_bytes(entrypoint=["/bin/app"], layers=["sha384/" + "a" * 96])
# SHA-384 of the shell script (its own generator) over which ACON made the signature of its
# first test set.
GSV_SIGNED_SHA384 = bytes.fromhex(
    "131c6e7a9da5a46bc7d7ad091a3d275ad2fa8cc0002f7619"
    "0e461e265337465ae059a3400e4d49f216fb29c79750b6ff"
)


@cache
def p384() -> tuple[ec.EllipticCurvePrivateKey, bytes]:
    key = ec.generate_private_key(ec.SECP384R1())
    return key, certificate_der(key.public_key(), key, hashes.SHA384())


@cache
def rsa_key(bits: int) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, bits)


def refused(raw: bytes, signature: bytes, certificate: bytes) -> Refusal:
    with pytest.raises(Refusal) as caught:
        verify_signed_manifest(raw, signature, certificate)
    return caught.value


# --- what is accepted --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("curve", "hash_algorithm"),
    [
        (ec.SECP256R1(), hashes.SHA384()),
        (ec.SECP384R1(), hashes.SHA384()),
        (ec.SECP384R1(), hashes.SHA512()),
        (ec.SECP521R1(), hashes.SHA512()),
        (ec.SECP521R1(), hashes.SHA384()),
    ],
)
def test_ecdsa_uses_the_hash_of_the_certificates_own_signature(
    curve: ec.EllipticCurve, hash_algorithm: hashes.SHA384 | hashes.SHA512
) -> None:
    key = ec.generate_private_key(curve)
    certificate = certificate_der(key.public_key(), key, hash_algorithm)
    signature = key.sign(RAW, ec.ECDSA(hash_algorithm))
    signed = verify_signed_manifest(RAW, signature, certificate)
    name = hash_algorithm.name
    assert signed.image_id.algorithm == name
    assert signed.image_id.signer == hashlib.new(name, certificate).hexdigest()
    assert signed.image_id.manifest == hashlib.new(name, RAW).hexdigest()
    assert signed.signer == signed.image_id.signer_id == signer_id_of(certificate)
    other = hashes.SHA512() if name == "sha384" else hashes.SHA384()
    assert isinstance(refused(RAW, key.sign(RAW, ec.ECDSA(other)), certificate), SignatureInvalid)


def test_ed25519_gives_ids_under_sha512() -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    certificate = certificate_der(key.public_key(), key, None)
    signed = verify_signed_manifest(RAW, key.sign(RAW), certificate)
    assert str(signed.image_id) == (
        f"sha512/{hashlib.sha512(certificate).hexdigest()}/{hashlib.sha512(RAW).hexdigest()}"
    )


@pytest.mark.parametrize("bits", [3072, 4096])
def test_rsa_from_3072_bits_with_pkcs1_v1_5(bits: int) -> None:
    key = rsa_key(bits)
    certificate = certificate_der(key.public_key(), key, hashes.SHA384())
    signature = key.sign(RAW, padding.PKCS1v15(), hashes.SHA384())
    assert verify_signed_manifest(RAW, signature, certificate).image_id.algorithm == "sha384"
    pss = key.sign(RAW, padding.PSS(padding.MGF1(hashes.SHA384()), 48), hashes.SHA384())
    assert refused(RAW, pss, certificate).item == "signature"


def test_the_hash_is_the_issuers_choice_when_another_key_issued_the_certificate() -> None:
    issuer = ed25519.Ed25519PrivateKey.generate()
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = certificate_der(key.public_key(), issuer, None)
    signature = sign_manifest(RAW, key, certificate)
    assert verify_signed_manifest(RAW, signature, certificate).image_id.algorithm == "sha512"
    key.public_key().verify(signature, RAW, ec.ECDSA(hashes.SHA512()))


def signer_keys() -> list[tuple[SignerKey, bytes]]:
    edwards, edwards_certificate = signer("someone")
    key = rsa_key(3072)
    return [
        p384(),
        (edwards, edwards_certificate),
        (key, certificate_der(key.public_key(), key, hashes.SHA512())),
    ]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_what_sign_manifest_signs_verifies(number: int) -> None:
    key, certificate = signer_keys()[number]
    signed = verify_signed_manifest(RAW, sign_manifest(RAW, key, certificate), certificate)
    assert signed.manifest.entrypoint == ("/bin/app",)
    assert (signed.manifest_bytes, signed.certificate_der) == (RAW, certificate)


# --- what is refused ---------------------------------------------------------------------------


def test_a_signature_over_other_bytes_is_refused() -> None:
    for key, certificate in signer_keys():
        signature = sign_manifest(RAW, key, certificate)
        error = refused(RAW + b"\n", signature, certificate)
        assert isinstance(error, SignatureInvalid)
        assert error.item == "signature"
        pretty = json.dumps(json.loads(RAW), indent=1).encode()
        assert isinstance(refused(pretty, signature, certificate), SignatureInvalid)


def test_another_signers_signature_is_refused() -> None:
    key, _ = p384()
    other = ec.generate_private_key(ec.SECP384R1())
    certificate = certificate_der(other.public_key(), other, hashes.SHA384())
    signature = key.sign(RAW, ec.ECDSA(hashes.SHA384()))
    assert refused(RAW, signature, certificate).item == "signature"


def test_a_signature_is_verified_before_the_manifest_is_parsed() -> None:
    key, certificate = p384()
    bad = b'{"aconSpecVersion":[9,9]}'
    assert isinstance(refused(bad, b"", certificate), SignatureInvalid)
    error = refused(bad, sign_manifest(bad, key, certificate), certificate)
    assert isinstance(error, FormatError)
    assert error.item == "$.aconSpecVersion"


def test_a_signature_has_one_encoding() -> None:
    key, certificate = p384()
    signature = key.sign(RAW, ec.ECDSA(hashes.SHA384()))
    r, s = utils.decode_dss_signature(signature)
    assert utils.encode_dss_signature(r, s) == signature
    raw_form = r.to_bytes(48, "big") + s.to_bytes(48, "big")
    long_length = b"\x30\x81" + signature[1:]
    zero = utils.encode_dss_signature(0, 0)
    for other in (signature + b"\0", signature[:-1], raw_form, long_length, zero, b"", b"\0" * 96):
        assert isinstance(refused(RAW, other, certificate), SignatureInvalid)
    edwards, edwards_certificate = signer("someone")
    for other in (edwards.sign(RAW) + b"\0", edwards.sign(RAW)[:63]):
        assert isinstance(refused(RAW, other, edwards_certificate), SignatureInvalid)
    key3072 = rsa_key(3072)
    rsa_certificate = certificate_der(key3072.public_key(), key3072, hashes.SHA384())
    good = sign_manifest(RAW, key3072, rsa_certificate)
    for other in (good + b"\0", b"\0" + good, good[1:]):
        assert isinstance(refused(RAW, other, rsa_certificate), SignatureInvalid)


def test_sizes_are_bounded() -> None:
    _, certificate = p384()
    error = refused(RAW, b"\0" * (MAX_SIGNATURE_BYTES + 1), certificate)
    assert (error.item, error.expected) == ("signature", "4096 bytes")
    error = refused(RAW, b"\0" * MAX_SIGNATURE_BYTES, certificate)
    assert isinstance(error, SignatureInvalid)
    error = refused(RAW, b"", b"\0" * (MAX_CERTIFICATE_BYTES + 1))
    assert (error.item, error.expected) == ("certificate", "65536 bytes")
    error = refused(b"[" * 300_000, b"", certificate)
    assert error.item == "manifest"


def test_bytes_behind_the_certificate_are_refused() -> None:
    key, certificate = p384()
    signature = sign_manifest(RAW, key, certificate)
    verify_signed_manifest(RAW, signature, certificate)
    for other in (certificate + b"\0", certificate * 2, certificate[:-1], b"", b"\x30\x80"):
        error = refused(RAW, signature, other)
        assert (error.kind, error.item) == ("format", "certificate")


@pytest.mark.parametrize(
    ("curve", "name"),
    [
        (ec.SECP224R1(), "secp224r1"),
        (ec.SECP256K1(), "secp256k1"),
        (ec.SECP192R1(), "secp192r1"),
        (ec.BrainpoolP384R1(), "brainpoolP384r1"),
    ],
)
def test_other_curves_are_refused(curve: ec.EllipticCurve, name: str) -> None:
    key = ec.generate_private_key(curve)
    certificate = certificate_der(key.public_key(), key, hashes.SHA384())
    error = refused(RAW, key.sign(RAW, ec.ECDSA(hashes.SHA384())), certificate)
    assert (error.kind, error.item, error.actual) == ("signature", "certificate", name)


def test_a_short_rsa_key_is_refused() -> None:
    key = rsa_key(2048)
    certificate = certificate_der(key.public_key(), key, hashes.SHA384())
    error = refused(RAW, key.sign(RAW, padding.PKCS1v15(), hashes.SHA384()), certificate)
    assert (error.kind, error.item, error.actual) == ("signature", "certificate", "2048")
    with pytest.raises(SignatureInvalid):
        sign_manifest(RAW, key, certificate)
    with pytest.raises(SignatureInvalid):
        signer_id_of(certificate)


def test_an_rsa_key_marked_for_pss_is_refused() -> None:
    key = rsa_key(3072)
    der = bytearray(certificate_der(key.public_key(), key, hashes.SHA384()))
    plain = bytes.fromhex("300d06092a864886f70d0101010500")
    marked = bytes.fromhex("300b06092a864886f70d01010a")
    at = der.index(plain)
    der[at : at + len(plain)] = marked
    # The certificate, its body and the key's structure got two bytes shorter.
    for header in (0, 4, at - 4):
        assert der[header + 1] == 0x82
        length = int.from_bytes(der[header + 2 : header + 4], "big") - 2
        der[header + 2 : header + 4] = length.to_bytes(2, "big")
    certificate = bytes(der)
    error = refused(RAW, key.sign(RAW, padding.PKCS1v15(), hashes.SHA384()), certificate)
    assert (error.kind, error.item) == ("signature", "certificate")
    assert error.actual == "1.2.840.113549.1.1.10"


def test_other_kinds_of_key_are_refused() -> None:
    issuer, _ = p384()
    goldilocks = ed448.Ed448PrivateKey.generate()
    certificate = certificate_der(goldilocks.public_key(), issuer, hashes.SHA384())
    assert refused(RAW, goldilocks.sign(RAW), certificate).item == "certificate"
    ancient = dsa.generate_private_key(2048)
    certificate = certificate_der(ancient.public_key(), issuer, hashes.SHA384())
    assert refused(RAW, ancient.sign(RAW, hashes.SHA384()), certificate).item == "certificate"


@pytest.mark.parametrize("hash_algorithm", [hashes.SHA224(), hashes.SHA256()])
def test_a_certificate_with_a_weak_hash_is_refused(
    hash_algorithm: hashes.SHA224 | hashes.SHA256,
) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = certificate_der(key.public_key(), key, hash_algorithm)
    for used in (hash_algorithm, hashes.SHA384()):
        error = refused(RAW, key.sign(RAW, ec.ECDSA(used)), certificate)
        assert (error.kind, error.item, error.actual) == (
            "signature",
            "certificate",
            hash_algorithm.name,
        )
    edwards = ed25519.Ed25519PrivateKey.generate()
    certificate = certificate_der(edwards.public_key(), key, hash_algorithm)
    assert refused(RAW, edwards.sign(RAW), certificate).item == "certificate"


def test_an_algorithm_without_a_named_hash_is_refused() -> None:
    issuer = ed448.Ed448PrivateKey.generate()
    key, _ = p384()
    certificate = certificate_der(key.public_key(), issuer, None)
    assert refused(RAW, key.sign(RAW, ec.ECDSA(hashes.SHA512())), certificate).item == "certificate"


def test_sha256_is_accepted_only_under_the_unsafe_setting() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = certificate_der(key.public_key(), key, hashes.SHA256())
    signature = key.sign(RAW, ec.ECDSA(hashes.SHA256()))
    signed = verify_signed_manifest(RAW, signature, certificate, unsafe_allow_sha256=True)
    assert signed.image_id.algorithm == "sha256"
    assert signer_id_of(certificate, unsafe_allow_sha256=True) == signed.signer
    assert matching_form(RAW, signature, certificate, unsafe_allow_sha256=True)[1] == RAW
    with pytest.raises(SignatureInvalid):
        signer_id_of(certificate)
    with pytest.raises(SignatureInvalid):
        matching_form(RAW, signature, certificate)
    with pytest.raises(SignatureInvalid):
        sign_manifest(RAW, key, certificate)
    loaded = x509.load_der_x509_certificate(certificate)
    assert certificate_hash_algorithm(loaded, unsafe_allow_sha256=True) == "sha256"
    with pytest.raises(SignatureInvalid):
        certificate_hash_algorithm(loaded)


def test_signing_needs_the_certificates_own_key() -> None:
    _, certificate = p384()
    for key in (ec.generate_private_key(ec.SECP384R1()), ed25519.Ed25519PrivateKey.generate()):
        with pytest.raises(SignatureInvalid) as caught:
            sign_manifest(RAW, key, certificate)
        assert caught.value.item == "private key"
    with pytest.raises(SignatureInvalid):
        sign_manifest(RAW, ed448.Ed448PrivateKey.generate(), certificate)


@settings(max_examples=400)
@given(st.integers(0, 2000), st.binary(min_size=1, max_size=4), st.sampled_from([0, 1, 2]))
def test_damaged_certificates_and_signatures_raise_nothing_but_refusals(
    offset: int, damage: bytes, number: int
) -> None:
    key, certificate = signer_keys()[number]
    signature = sign_manifest(RAW, key, certificate)
    damaged = bytearray(certificate)
    offset %= len(damaged)
    damaged[offset : offset + len(damage)] = damage
    try:
        signed = verify_signed_manifest(RAW, signature, bytes(damaged))
    except Refusal:
        pass
    else:
        # A field that is not judged was changed: then it is another signer.
        same = bytes(damaged) == certificate
        assert (signed.signer == signer_id_of(certificate)) == same
    damaged = bytearray(signature)
    offset %= len(damaged)
    damaged[offset : offset + len(damage)] = damage
    if damaged != signature:
        assert refused(RAW, bytes(damaged), certificate).item == "signature"


# --- the type that only verification makes -----------------------------------------------------


def test_a_signed_manifest_cannot_be_made_elsewhere() -> None:
    with pytest.raises(TypeError):
        SignedManifest()
    with pytest.raises(TypeError):
        SignedManifest.__new__(SignedManifest)
    signed = image()
    with pytest.raises((TypeError, AttributeError)):
        copy.copy(signed)
    with pytest.raises((TypeError, AttributeError)):
        copy.deepcopy(signed)
    pickled = pickle.dumps(signed)
    with pytest.raises((TypeError, AttributeError)):
        pickle.loads(pickled)
    with pytest.raises(TypeError):
        type("Forged", (SignedManifest,), {})


def test_a_signed_manifest_does_not_change() -> None:
    signed = image()
    with pytest.raises(AttributeError):
        signed.manifest_bytes = b"other"
    with pytest.raises(AttributeError):
        del signed.signature
    with pytest.raises(AttributeError):
        signed.note = 1


def test_equal_bytes_make_equal_images() -> None:
    first, again, other = image(), image(), image(entrypoint=["/a"])
    assert first == again
    assert hash(first) == hash(again)
    assert first != other
    assert first != 1
    assert str(first.image_id) in repr(first)


# --- forms -------------------------------------------------------------------------------------


def test_the_form_that_was_signed_is_found() -> None:
    key, certificate = p384()
    value = {"aconSpecVersion": [1, 0], "env": ["A=<&>"], "\uffff": 1, "\U0001f600": 2}
    pretty = json.dumps(value, indent=2).encode()
    forms = {"as received": pretty, "canonical": encode(value), "go": encode_go(value)}
    assert len(set(forms.values())) == 3
    for name, form in forms.items():
        signature = sign_manifest(form, key, certificate)
        assert matching_form(pretty, signature, certificate) == (name, form)
    with pytest.raises(SignatureInvalid):
        matching_form(pretty, sign_manifest(b"{}", key, certificate), certificate)
    with pytest.raises(FormatError):
        matching_form(b'{"a":1,"a":1}', b"", certificate)


# --- real signatures ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("digest", "executable"),
    [
        (
            "ac3152d6492cf47ae3231c9b4251879a380b849a6578eb20aa0be34e0af232bf"
            "0892c59ec549084672e30d76d21fc946",
            False,
        ),
        (
            "b1c8b25c5c8601fee394e2edff9102ade1964b175928f697bcaa16d68230fc15"
            "5fc53b8faced81e711ce397ec6d21fed",
            True,
        ),
    ],
)
def test_images_that_aconcli_signed_verify(vectors: Path, digest: str, executable: bool) -> None:
    folder = vectors / "acon" / "aconcli_repo" / "manifests" / "sha384" / digest
    pretty, signature, certificate = (
        (folder / name).read_bytes() for name in ("acon.json", "signature", "signer.cer")
    )
    assert isinstance(refused(pretty, signature, certificate), SignatureInvalid)
    name, form = matching_form(pretty, signature, certificate)
    assert name == "canonical"
    assert form == encode_go(json.loads(pretty))
    signed = verify_signed_manifest(form, signature, certificate)
    assert signed.image_id.manifest == digest
    assert signed.image_id.signer == hashlib.sha384(certificate).hexdigest()
    assert signed.manifest.is_executable == executable


@pytest.mark.parametrize(
    ("request_name", "digest"),
    [
        ("run-01-post-manifest.http", "ac3152d6"),
        ("run-all-01-post-manifest-vendor.http", "ac3152d6"),
        ("run-all-04-post-manifest-app.http", "b1c8b25c"),
    ],
)
def test_what_aconcli_sends_verifies_as_received(
    vectors: Path, request_name: str, digest: str
) -> None:
    head, _, body = (
        (vectors / "acon" / "aconcli_wire" / request_name).read_bytes().partition(b"\r\n\r\n")
    )
    boundary = b"--" + head.partition(b"boundary=")[2].partition(b"\r\n")[0]
    parts = [
        part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n") for part in body.split(boundary)[1:4]
    ]
    manifest, signature, certificate = parts
    signed = verify_signed_manifest(manifest, signature, certificate)
    assert signed.image_id.manifest.startswith(digest)


def test_the_certificates_of_acons_test_sets(vectors: Path) -> None:
    folder = vectors / "acon"
    curve521 = (folder / "set1_cert.der").read_bytes()
    assert str(signer_id_of(curve521)) == f"sha384/{hashlib.sha384(curve521).hexdigest()}"
    rsa3072 = (folder / "set2_cert.der").read_bytes()
    assert str(signer_id_of(rsa3072)) == f"sha384/{hashlib.sha384(rsa3072).hexdigest()}"
    key = x509.load_der_x509_certificate(rsa3072).public_key()
    assert key == load_pem_public_key((folder / "set2_pub.pem").read_bytes())


def test_the_sha256_certificate_of_acons_test_set_is_refused(vectors: Path) -> None:
    """Its signature is SHA-384 over a shell script, though the certificate's hash is SHA-256."""
    folder = vectors / "acon"
    certificate = (folder / "set1_gsv_cert.der").read_bytes()
    signature = (folder / "set1_gsv_sig-sha384").read_bytes()
    sample = (folder / "set1_sample.json").read_bytes()
    key = x509.load_der_x509_certificate(certificate).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    key.verify(signature, GSV_SIGNED_SHA384, ec.ECDSA(utils.Prehashed(hashes.SHA384())))
    error = refused(sample, signature, certificate)
    assert (error.kind, error.item, error.actual) == ("signature", "certificate", "sha256")
    unsafe = signer_id_of(certificate, unsafe_allow_sha256=True)
    assert str(unsafe) == f"sha256/{hashlib.sha256(certificate).hexdigest()}"
    with pytest.raises(SignatureInvalid) as caught:
        matching_form(sample, signature, certificate, unsafe_allow_sha256=True)
    assert caught.value.item == "signature"
