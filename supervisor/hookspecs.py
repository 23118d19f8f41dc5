"""Every hook that a plugin may implement, by kind.

pluggy declares, registers and matches arguments; `supervisor.plugin_host` calls.
Upstream's multicall is never used: it would return coroutines, let a wrapper turn
a Deny into an Allow, and take "no implementation" for consent (design, "Events and
hooks"). What happens when an implementation fails or hangs depends on the kind:

| kind    | body               | walked                          | failure or timeout        |
|---------|--------------------|---------------------------------|---------------------------|
| gate    | async              | config order, first Deny ends   | counts as Deny            |
| measure | sync, one thread   | one lock, config order          | measurement halts for good|
| provide | async              | the one the config names        | error to the caller       |
| observe | async              | own bounded channel and task    | logged and counted        |
| serve   | async, task_status | service nursery                 | supervisor shuts down     |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import pluggy

if TYPE_CHECKING:
    import trio

    from supervisor.container_seams import ContainerRuntime
    from supervisor.events import ContainerStarting, Event, ImageAdmitting, LayerFetched
    from supervisor.formats.delegation import AliasStatement
    from supervisor.formats.signature import SignedManifest
    from supervisor.operations import ContainerOperations, Operations
    from supervisor.seams import LayerStore, QuoteSource, Registers
    from supervisor.verdicts import Allow, Deny

PROJECT = "supervisor"
HookKind = Literal["gate", "measure", "provide", "observe", "serve"]

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

_F = TypeVar("_F", bound=Callable[..., Any])


def _kind(kind: HookKind) -> Callable[[_F], _F]:
    def mark(function: _F) -> _F:
        function.__dict__["hook_kind"] = kind
        return hookspec(function)

    return mark


class Hooks(Protocol):
    """The specifications. A plugin implements any subset, each marked `@hookimpl`."""

    # --- gates: judge, never act ----------------------------------------------------------

    @_kind("gate")
    async def judge_image(self, event: ImageAdmitting) -> Allow | Deny:
        """Judge an image before it is admitted.

        When: after signature, format and launch policy; before measurement.
        Order: config order, one at a time; the first Deny ends the walk.
        Cancellation: may be cancelled at any checkpoint; keep no state.
        Failure: exception, timeout or wrong type counts as Deny.
        """

    @_kind("gate")
    async def verify_layer(self, event: LayerFetched) -> Allow | Deny:
        """Judge a layer's bytes before anything parses or mounts them.

        When: after the bytes are stored where nothing can change them and hashed.
        Order, cancellation, failure: as `judge_image`.
        """

    @_kind("gate")
    async def judge_start(self, event: ContainerStarting) -> Allow | Deny:
        """Judge a start: resolved layers, arguments and environment.

        When: after the supervisor resolved layers and environment; before measurement.
        Order, cancellation, failure: as `judge_image`.
        """

    # --- measure: extend a register -----------------------------------------------------------

    @_kind("measure")
    def registers(self, rtmr_index: int) -> Registers:
        """The register to measure into. Called once, before the first event.

        Every configured implementation is extended, in config order, under one lock
        and in one worker thread; a failure or a missed deadline halts measurement.
        """

    # --- provide: one implementation does the work --------------------------------------------

    @_kind("provide")
    async def quote_source(self) -> QuoteSource:
        """What makes quotes. Called once at start; failure ends the start."""

    @_kind("provide")
    async def layer_store(self) -> LayerStore:
        """What stores and mounts layers. Called once at start; failure ends the start."""

    @_kind("provide")
    async def container_runtime(self) -> ContainerRuntime:
        """What runs containers. Called once at start; failure ends the start."""

    @_kind("provide")
    async def delegation_statements(self, signed: SignedManifest) -> tuple[AliasStatement, ...]:
        """Which layers an admitted image's signer vouches for.

        Called for each image after its signature was verified, before it is admitted.
        With no implementation configured no delegated layer resolves.
        """

    # --- observe ------------------------------------------------------------------------------

    @_kind("observe")
    async def observe(self, event: Event) -> None:
        """Be told of an event. Events are lost (and counted) when the observer is slow."""

    # --- serve --------------------------------------------------------------------------------

    @_kind("serve")
    async def lifespan(self, task_status: trio.TaskStatus[None]) -> None:
        """Hold what the plugin needs for as long as the daemon lives.

        Runs first, in config order, before anything is measured: clean up what a
        predecessor left, then call `task_status.started()` and sleep. Cancelled in
        reverse order after everything else has ended; clean up within a deadline.
        Failure: the supervisor does not start, or shuts down in order.
        """

    @_kind("serve")
    async def serve(self, operations: Operations, task_status: trio.TaskStatus[None]) -> None:
        """Serve clients until cancelled. `started()` once they can connect.

        Failure: the supervisor shuts down in order.
        """

    @_kind("serve")
    async def serve_container(
        self,
        listener: trio.SocketListener,
        operations: ContainerOperations,
        task_status: trio.TaskStatus[None],
    ) -> None:
        """Serve one container on its own socket until cancelled; the caller closes `listener`.

        Failure: logged; that container has no socket any more; nothing else is disturbed.
        """


def hook_kind(name: str) -> HookKind | None:
    """The kind of a declared hook, or None for a name that is no hook."""
    spec = getattr(Hooks, name, None)
    kind: HookKind | None = getattr(spec, "hook_kind", None)
    return kind
