"""What happened and what happens, for those who watch."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import trio
from http_fakes import IMAGE_ID, FakeOperations, ask, served
from http_streams import read_all, reading

from plugins.http_api.event_ring import EventRing
from supervisor import ContainerExited, Event, HookFailed, LayerProgress, Sealed

EVENTS = "/api/v2/events"


def exited(container_id: int) -> ContainerExited:
    return ContainerExited(
        container_id=container_id,
        image_id=IMAGE_ID,
        exit_code=0,
        signal=None,
        out_of_memory=False,
    )


def numbers(values: list[dict[str, object]]) -> list[object]:
    return [value["number"] for value in values if "number" in value]


async def test_events_are_shown_with_number_time_and_fields(tmp_path: Path) -> None:
    operations = FakeOperations()
    async with served(operations, tmp_path) as socket:
        nothing = await read_all(socket, EVENTS)
        await operations.report(exited(7))
        await operations.report(HookFailed(plugin="ä", hook="observe", reason="\n"))
        values = await read_all(socket, EVENTS)
        later = await read_all(socket, f"{EVENTS}?after=1")
    assert nothing == [{"ended": False, "after": 0}]
    assert later == values[1:]
    times = [str(value.pop("time")) for value in values[:-1]]
    assert all(time.endswith("Z") for time in times)
    assert values == [
        {
            "number": 1,
            "event": {
                "type": "container.exited",
                "container_id": 7,
                "image_id": IMAGE_ID,
                "exit_code": 0,
                "signal": None,
                "out_of_memory": False,
            },
        },
        {
            "number": 2,
            "event": {"type": "hook.failed", "plugin": "ä", "hook": "observe", "reason": "\n"},
        },
        {"ended": False, "after": 2},
    ]


async def test_events_arrive_as_they_happen(tmp_path: Path) -> None:
    operations = FakeOperations()
    async with (
        served(operations, tmp_path) as socket,
        reading(socket, f"{EVENTS}?follow=1") as reader,
    ):
        assert await reader.line() == b""
        for container_id in (1, 2, 3):
            await operations.report(exited(container_id))
            value = await reader.value()
            assert value["number"] == container_id
            assert isinstance(value["event"], dict)
            assert value["event"]["container_id"] == container_id


async def test_how_far_a_fetch_has_come_is_no_event(tmp_path: Path) -> None:
    operations = FakeOperations()
    digest = f"sha384/{'0' * 96}"
    async with served(operations, tmp_path) as socket:
        await operations.report(LayerProgress(digest=digest, received_bytes=1, total_bytes=2))
        await operations.report(Sealed())
        values = await read_all(socket, EVENTS)
    assert numbers(values) == [1]
    assert values[0]["event"] == {"type": "sealed"}


async def test_a_watcher_that_comes_back_misses_nothing_and_sees_nothing_twice(
    tmp_path: Path,
) -> None:
    operations = FakeOperations()
    seen: list[object] = []
    after: object = 0
    async with served(operations, tmp_path, follow_deadline_s=0.05) as socket:
        for step in range(20):
            await operations.report(exited(step))
            await operations.report(exited(step))
            values = await read_all(socket, f"{EVENTS}?after={after}&follow={step % 2}")
            seen += numbers(values)
            after = values[-1]["after"]
    assert seen == list(range(1, 41))


async def test_a_watcher_that_does_not_read_is_told_what_it_missed(tmp_path: Path) -> None:
    operations = FakeOperations()
    count = 20_000
    async with (
        served(operations, tmp_path, kept_events_kib=64, follow_deadline_s=2) as socket,
        reading(socket, f"{EVENTS}?follow=1") as reader,
    ):
        assert await reader.line() == b""
        for number in range(count):
            await operations.report(exited(number))
            await trio.lowlevel.checkpoint()
        seen: list[int] = []
        missed = 0
        while not seen or seen[-1] != count:
            value = await reader.value()
            if "lost_events" in value:
                missed += int(str(value["lost_events"]))
            else:
                seen.append(int(str(value["number"])))
    assert missed > 0
    assert seen == sorted(set(seen))
    assert len(seen) + missed == count


@pytest.mark.parametrize("kept_kib", [4, 64])
async def test_what_is_kept_is_bounded_and_the_rest_is_counted(kept_kib: int) -> None:
    ring = EventRing(kept_bytes=kept_kib * 1024, now_ns=lambda: 1_500_000_000_123_456_789)
    for number in range(1, 1001):
        ring.observe(exited(number))
    text = b""
    after = 0
    while (piece := ring.read(after)).data:
        text += piece.data
        after = piece.after
    lost, *events = msgspec.json.decode(b"[" + b",".join(text.splitlines()) + b"]")
    assert after == ring.last_number == 1000
    assert lost["lost_events"] == 1000 - len(events)
    assert [event["number"] for event in events] == list(range(1001 - len(events), 1001))
    assert events[0]["time"] == "2017-07-14T02:40:00.123456Z"
    size_bytes = len(text.split(b"\n", 1)[1])
    assert size_bytes <= kept_kib * 1024
    assert size_bytes + 128 * (len(events) + 1) + len(text) // len(events) > kept_kib * 1024 * 0.9


async def test_an_event_larger_than_all_that_is_kept_is_lost_and_counted() -> None:
    ring = EventRing(kept_bytes=4096)
    huge: Event = HookFailed(plugin="p", hook="h", reason="x" * 5000)
    ring.observe(huge)
    piece = ring.read(0)
    assert (piece.data, piece.after) == (b'{"lost_events":1}\n', 1)
    assert ring.read(1).data == b""
    with trio.move_on_after(0.05) as waited:
        await ring.wait(1)
    assert waited.cancelled_caught


@pytest.mark.parametrize(
    ("query", "status", "item"),
    [
        ("after=x", 400, "after"),
        ("follow=yes", 400, "follow"),
        ("since=1", 400, "query"),
        ("after=1", 409, "after"),
    ],
)
async def test_wrong_queries_are_refused_by_name(
    tmp_path: Path, query: str, status: int, item: str
) -> None:
    async with served(FakeOperations(), tmp_path) as socket:
        answer = await ask(socket, "GET", f"{EVENTS}?{query}")
    assert answer.status == status
    assert msgspec.json.decode(answer.body)["error"]["item"] == item
