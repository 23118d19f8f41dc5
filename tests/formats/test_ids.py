from __future__ import annotations

import pytest

from supervisor.formats.errors import FormatError
from supervisor.formats.ids import ImageId, SignerId, parse_image_id, parse_signer_id

A96 = "a" * 96
B96 = "b" * 96


def test_ids_are_written_as_they_are_read() -> None:
    signer = parse_signer_id(f"sha384/{A96}")
    assert signer == SignerId("sha384", A96)
    assert str(signer) == f"sha384/{A96}"
    image = parse_image_id(f"sha512/{'c' * 128}/{'d' * 128}")
    assert image == ImageId("sha512", "c" * 128, "d" * 128)
    assert str(image) == f"sha512/{'c' * 128}/{'d' * 128}"
    assert image.signer_id == SignerId("sha512", "c" * 128)


def test_ids_can_be_sorted_and_hashed() -> None:
    ids = [parse_image_id(f"sha384/{x}/{y}") for x in (B96, A96) for y in (B96, A96)]
    assert [str(i) for i in sorted(ids)] == sorted(str(i) for i in ids)
    assert len({*ids, *ids}) == 4


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sha384",
        "sha384/",
        f"sha384/{A96}/",
        f"sha384/{A96[:-1]}",
        f"sha384/{A96}a",
        f"sha384/{A96.upper()}",
        f"sha384/{A96[:-1]}g",
        f"sha384/ {A96[:-1]}",
        f"sha384/{A96[:-1]}\n",
        f"SHA384/{A96}",
        f"sha-384/{A96}",
        f"/{A96}",
        f"sha256/{'a' * 64}",
        f"sha224/{'a' * 56}",
        f"sha1/{'a' * 40}",
        "md5/" + "a" * 32,
        "x" * 100_000,
        f"{'x' * 100_000}/{A96}",
    ],
)
def test_a_signer_id_in_another_form_is_refused(text: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_signer_id(text, item="the id")
    assert caught.value.item == "the id"
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"sha384/{A96}",
        f"sha384/{A96}/{B96}/",
        f"sha384/{A96}//{B96}",
        f"/sha384/{A96}/{B96}",
        f"sha384/{A96}/{B96.upper()}",
        f"sha384/{A96}/{B96}b",
        f"sha384/{A96}/*",
        f"sha384/*/{B96}",
        f"sha384/{'a' * 128}/{'b' * 128}",
        f"sha256/{'a' * 64}/{'b' * 64}",
    ],
)
def test_an_image_id_in_another_form_is_refused(text: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_image_id(text, item="the id")
    assert caught.value.item == "the id"


def test_sha256_is_read_only_under_the_unsafe_setting() -> None:
    signer = f"sha256/{'a' * 64}"
    image = f"{signer}/{'b' * 64}"
    assert str(parse_signer_id(signer, unsafe_allow_sha256=True)) == signer
    assert str(parse_image_id(image, unsafe_allow_sha256=True)) == image
    with pytest.raises(FormatError):
        parse_image_id(f"sha224/{'a' * 56}/{'b' * 56}", unsafe_allow_sha256=True)
