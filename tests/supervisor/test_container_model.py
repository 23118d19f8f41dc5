"""Any program of starts, exits, signals, restarts, waits and a stop, beside a simple model.

The model knows of each container whether it runs, is kept or gone; the supervisor must agree
after every step, hold the manifest's `maxInstances`, never use an id again and leave nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import trio
import trio.testing
from container_machines import Machine, containing, invocation
from hypothesis import event, given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from supervisor import Conflict, DeadlineExceeded, ExitStatus, PolicyDenied, UnknownItem

KEEP_S, MAX_KEPT, MAX_REMEMBERED = 50, 2, 4
TIMEOUT_S = 7
# Of each image: how many may run, and whether it may be restarted.
IMAGES = ((1, True), (2, True), (0, False))
State = Literal["running", "kept", "gone"]


class Step(NamedTuple):
    """`target` picks an image for a start, else one of the containers so far."""

    name: str
    target: int


STEPS = st.builds(
    Step,
    st.sampled_from(
        ["start", "start", "exit", "signal", "restart", "deaf restart", "expire", "wait", "invoke"]
    ),
    st.integers(0, 5),
)


class Known(NamedTuple):
    """What the model knows of a container."""

    image: int
    state: State
    ended_at: float = 0
    restarts: int = 0


class Model:
    """What must be, in words as few as they get."""

    def __init__(self) -> None:
        self.containers: dict[int, Known] = {}
        self.last_id = 0

    def has_room(self, image: int) -> bool:
        limit, _ = IMAGES[image]
        return not limit or len(list(self.those("running", image))) < limit

    def those(self, state: State, image: int | None = None) -> Iterator[int]:
        for number, known in self.containers.items():
            if known.state == state and image in (None, known.image):
                yield number

    def start(self, image: int) -> None:
        self.last_id += 1
        self.containers[self.last_id] = Known(image, "running")
        ended = [*self.those("kept"), *self.those("gone")]
        ended.sort(key=lambda number: self.containers[number].ended_at)
        for number in ended[: max(0, len(ended) - MAX_REMEMBERED)]:
            del self.containers[number]

    def end(self, number: int, at: float) -> None:
        known = self.containers[number]
        state: State = "kept" if IMAGES[known.image][1] else "gone"
        self.containers[number] = known._replace(state=state, ended_at=at)
        kept = sorted(self.those("kept"), key=lambda one: self.containers[one].ended_at)
        for old in kept[: max(0, len(kept) - MAX_KEPT)]:
            self.containers[old] = self.containers[old]._replace(state="gone")

    def restart(self, number: int) -> None:
        known = self.containers[number]
        self.containers[number] = known._replace(state="running", restarts=known.restarts + 1)

    def pass_time(self, now: float) -> None:
        for number in list(self.those("kept")):
            if now >= self.containers[number].ended_at + KEEP_S:
                self.containers[number] = self.containers[number]._replace(state="gone")


class Program:
    """Carries steps out on the supervisor and on the model."""

    def __init__(self, machine: Machine, images: list[str]) -> None:
        self.machine = machine
        self.images = images
        self.model = Model()

    async def carry_out(self, step: Step) -> None:
        if step.name == "start":
            await self.start(step.target % len(IMAGES))
        elif step.name in ("expire", "wait"):
            await trio.sleep(KEEP_S + 1 if step.name == "expire" else 20)
        elif self.model.last_id:
            await self.act(step.name, 1 + step.target % self.model.last_id)
        await wait_all_tasks_blocked()
        self.model.pass_time(trio.current_time())
        self.compare()
        # So that no two things end in the same moment, and "first" has a meaning.
        await trio.sleep(0.1)

    async def start(self, image: int) -> None:
        try:
            number = await self.machine.supervisor.start(self.images[image], [])
        except Conflict:
            assert not self.model.has_room(image)
            event("start refused")
        else:
            assert self.model.has_room(image)
            self.model.start(image)
            assert number == self.model.last_id  # never one that was used before

    async def act(self, name: str, number: int) -> None:
        known = self.model.containers.get(number)
        runs = known is not None and known.state == "running"
        if name == "exit" and runs:
            self.machine.process(number).end(ExitStatus(exit_code=number))
            self.model.end(number, trio.current_time())
        elif name == "signal":
            await self.signal(number, known)
        elif name == "invoke":
            await self.invoke(number, known)
        elif name in ("restart", "deaf restart"):
            if runs:
                self.machine.process(number).is_deaf = name == "deaf restart"
            await self.restart(number, known)
            if runs and number in self.machine.runtime.running:
                self.machine.process(number).is_deaf = False

    async def signal(self, number: int, known: Known | None) -> None:
        try:
            await self.machine.supervisor.signal(number, 15)
        except UnknownItem:
            assert known is None
        except Conflict:
            assert known is not None and known.state != "running"
        else:
            self.model.end(number, trio.current_time())

    async def invoke(self, number: int, known: Known | None) -> None:
        try:
            await self.machine.supervisor.invoke(number, invocation())
        except UnknownItem:
            assert known is None
        except Conflict:
            assert known is not None and known.state != "running"
        else:
            assert known is not None and known.state == "running"

    async def restart(self, number: int, known: Known | None) -> None:
        was_deaf = number in self.machine.runtime.running and self.machine.process(number).is_deaf
        try:
            await self.machine.supervisor.restart(number, timeout_s=TIMEOUT_S)
        except UnknownItem:
            assert known is None
        except PolicyDenied:
            assert known is not None and not IMAGES[known.image][1]
        except DeadlineExceeded:
            assert known is not None and known.state == "running" and was_deaf
            event("restart timed out")
        except Conflict:
            assert known is not None
            full = known.state == "kept" and not self.model.has_room(known.image)
            assert known.state == "gone" or full
            event("restart refused")
        else:
            assert known is not None and known.state in ("running", "kept") and not was_deaf
            assert known.state == "running" or self.model.has_room(known.image)
            self.model.restart(number)
            event(f"restarted while {known.state}")

    def compare(self) -> None:
        machine, model = self.machine, self.model
        shown = {view.container_id: view for view in machine.supervisor.containers()}
        assert list(shown) == sorted(model.containers)
        for number, known in model.containers.items():
            view = shown[number]
            is_running = known.state == "running"
            assert view.state == ("running" if is_running else "exited"), number
            assert view.restarts == known.restarts
            allowed = IMAGES[known.image][1]
            assert view.restartable == (allowed and known.state != "gone")
        running, kept = set(model.those("running")), set(model.those("kept"))
        assert set(machine.runtime.running) == running
        assert set(machine.runtime.prepared) == running | kept
        assert set(machine.memory.layers.mounted) == running | kept
        for image, (limit, _) in enumerate(IMAGES):
            assert not limit or len(list(model.those("running", image))) <= limit


@settings(max_examples=150, deadline=None)
@given(st.lists(STEPS, min_size=10, max_size=40), st.random_module())
def test_containers_live_as_the_model_says(steps: list[Step], _schedule: object) -> None:
    async def run_program() -> None:
        with tempfile.TemporaryDirectory() as name:
            async with containing(
                Path(name),
                keep_exited_s=KEEP_S,
                max_kept_exited=MAX_KEPT,
                max_remembered=MAX_REMEMBERED,
            ) as machine:
                images = [
                    await machine.load(
                        name=f"app-{at}:1",
                        signals=[15],
                        maxInstances=limit,
                        noRestart=not may_restart,
                    )
                    for at, (limit, may_restart) in enumerate(IMAGES)
                ]
                program = Program(machine, images)
                for step in steps:
                    await program.carry_out(step)
            assert machine.is_empty
            assert {view.state for view in machine.supervisor.containers()} <= {"exited"}

    trio.run(run_program, clock=trio.testing.MockClock(autojump_threshold=0))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["start", "exit", "signal", "restart", "invoke"]),
            st.integers(0, 3),
            st.integers(0, 12),
        ),
        min_size=4,
        max_size=20,
    ),
    st.integers(0, 40),
    st.random_module(),
)
def test_whatever_happens_at_once_ends_in_order(
    steps: list[tuple[str, int, int]], stop_after: int, _schedule: object
) -> None:
    """No model here: everything at once, a stop in the middle, and what always holds."""

    async def one(machine: Machine, image_id: str, name: str, target: int, delay: int) -> None:
        for _ in range(delay):
            await trio.lowlevel.checkpoint()
        number = 1 + target % 4
        try:
            if name == "start":
                await machine.supervisor.start(image_id, [])
            elif name == "exit" and number in machine.runtime.running:
                machine.process(number).end(ExitStatus(exit_code=1))
            elif name == "signal":
                await machine.supervisor.signal(number, 15)
            elif name == "restart":
                await machine.supervisor.restart(number, timeout_s=TIMEOUT_S)
                event("restarted")
            elif name == "invoke":
                await machine.supervisor.invoke(number, invocation())
        except (Conflict, UnknownItem, DeadlineExceeded) as error:
            event(type(error).__name__)
        at_once = [one for one in machine.runtime.running.values() if not one.has_ended]
        assert len(at_once) <= 2

    async def run_program() -> None:
        with tempfile.TemporaryDirectory() as name:
            # The nursery outlives the supervisor: whoever still asks then must be answered.
            async with (
                trio.open_nursery() as nursery,
                containing(Path(name), max_kept_exited=1) as machine,
            ):
                image_id = await machine.load(signals=[15], maxInstances=2)
                for _ in range(2):  # one that has ended and one that runs, to begin with
                    running = await machine.supervisor.start(image_id, [])
                machine.process(running - 1).end(ExitStatus(exit_code=0))
                await wait_all_tasks_blocked()
                for step in steps:
                    nursery.start_soon(one, machine, image_id, *step)
                for _ in range(stop_after):
                    await trio.lowlevel.checkpoint()
            assert machine.is_empty
            assert {view.state for view in machine.supervisor.containers()} <= {"exited"}
            assert not list(Path(name, "sockets").iterdir())

    trio.run(run_program, clock=trio.testing.MockClock(autojump_threshold=0))
