"""The synthetic boot: its log replays, and another base image has other registers."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugins.tdx_sim import firmware
from plugins.tdx_sim.firmware import BaseImage
from plugins.tdx_sim.registers import RegisterFile
from supervisor.formats.boot_log import parse_boot_log, replay_rtmrs

sentences = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)
images = st.builds(
    BaseImage, firmware=sentences, kernel=sentences, initrd=sentences, command_line=sentences
)


def booted(image: BaseImage) -> RegisterFile:
    registers = RegisterFile(mr_td=firmware.mr_td(image))
    for event in firmware.boot_events(image):
        registers.extend_at_boot(event.rtmr_index, event.digest_sha384)
    return registers


@given(images)
def test_the_log_of_any_base_image_replays_to_its_registers(image: BaseImage) -> None:
    log = firmware.event_log(firmware.boot_events(image))
    parsed = parse_boot_log(log)
    assert parsed.end_offset == len(log)
    assert tuple(replay_rtmrs(parsed.events).values()) == booted(image).rtmrs


def test_firmware_kernel_and_command_line_are_measured_and_rtmr3_is_left_at_zero() -> None:
    rtmrs = booted(BaseImage()).rtmrs
    assert rtmrs[3] == bytes(48)
    assert len({*rtmrs}) == 4


@pytest.mark.parametrize(
    ("part", "register"), [("kernel", 1), ("initrd", 2), ("command_line", 2), ("firmware", None)]
)
def test_each_part_of_the_base_image_changes_its_own_register_only(
    part: str, register: int | None
) -> None:
    before = booted(BaseImage())
    after = booted(msgspec.structs.replace(BaseImage(), **{part: "another"}))
    changed = [i for i in range(4) if before.rtmrs[i] != after.rtmrs[i]]
    assert changed == ([] if register is None else [register])
    assert (before.mr_td != after.mr_td) is (register is None)


def test_the_command_line_can_be_read_in_the_log() -> None:
    image = BaseImage(command_line="ro roothash=abc")
    events = parse_boot_log(firmware.event_log(firmware.boot_events(image))).events
    assert b"kernel_cmdline: ro roothash=abc\0" in [event.data for event in events]


def test_what_hashes_to_its_digest_by_specification_does() -> None:
    events = parse_boot_log(firmware.event_log(firmware.boot_events(BaseImage()))).events
    by_specification = {0x4, 0x80000001, 0x80000007}
    for event in events:
        assert event.data_matches_digest is (event.event_type in by_specification)


def test_an_empty_part_is_refused_when_decoded() -> None:
    with pytest.raises(msgspec.ValidationError, match="command_line"):
        msgspec.convert({"command_line": ""}, BaseImage)
