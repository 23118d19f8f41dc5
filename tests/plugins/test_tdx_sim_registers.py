"""The register file refuses what a guest's kernel refuses, and forgets nothing."""

from __future__ import annotations

import errno
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugins.tdx_sim.registers import GUEST_RTMRS, RegisterFile

MR_TD = bytes(range(48))
DIGEST = hashlib.sha384(b"event").digest()


def test_registers_are_zero_and_mrtd_is_given() -> None:
    registers = RegisterFile(mr_td=MR_TD)
    assert registers.mr_td == MR_TD
    assert registers.rtmrs == (bytes(48),) * 4


def test_extend_hashes_the_register_followed_by_the_digest() -> None:
    registers = RegisterFile(mr_td=MR_TD)
    registers.extend(3, DIGEST)
    assert registers.read(3) == hashlib.sha384(bytes(48) + DIGEST).digest()
    assert registers.rtmrs[:3] == (bytes(48),) * 3


@pytest.mark.parametrize("rtmr_index", [0, 1])
def test_a_guest_may_not_extend_the_registers_of_the_firmware(rtmr_index: int) -> None:
    registers = RegisterFile(mr_td=MR_TD)
    with pytest.raises(PermissionError):
        registers.extend(rtmr_index, DIGEST)
    assert registers.rtmrs == (bytes(48),) * 4
    registers.extend_at_boot(rtmr_index, DIGEST)
    assert registers.read(rtmr_index) == hashlib.sha384(bytes(48) + DIGEST).digest()


@pytest.mark.parametrize("rtmr_index", [-1, 4])
def test_there_are_four_registers(rtmr_index: int) -> None:
    registers = RegisterFile(mr_td=MR_TD)
    for use in (
        lambda: registers.read(rtmr_index),
        lambda: registers.extend(rtmr_index, DIGEST),
        lambda: registers.extend_at_boot(rtmr_index, DIGEST),
    ):
        with pytest.raises(OSError) as refused:
            use()
        assert refused.value.errno == errno.ENOENT


@pytest.mark.parametrize("length", [0, 1, 47, 49, 96])
def test_an_extend_of_another_length_is_refused_and_changes_nothing(length: int) -> None:
    registers = RegisterFile(mr_td=MR_TD)
    with pytest.raises(OSError) as refused:
        registers.extend(2, bytes(length))
    assert refused.value.errno == errno.EINVAL
    assert registers.rtmrs == (bytes(48),) * 4


@given(
    st.lists(
        st.tuples(st.sampled_from(GUEST_RTMRS), st.binary(min_size=48, max_size=48)), max_size=20
    )
)
def test_every_register_holds_the_replay_of_its_own_extends(
    extends: list[tuple[int, bytes]],
) -> None:
    registers = RegisterFile(mr_td=MR_TD)
    expected = [bytes(48)] * 4
    for index, digest in extends:
        registers.extend(index, digest)
        expected[index] = hashlib.sha384(expected[index] + digest).digest()
    assert list(registers.rtmrs) == expected
