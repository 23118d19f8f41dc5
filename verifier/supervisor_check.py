"""The supervisor, its plugins and its configuration, as it measured them, against the policy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

from supervisor.formats import canonical_json
from supervisor.formats.evidence import MAX_CONFIG_BYTES
from supervisor.formats.log_events import Component, StartEvent
from verifier.log_check import LOG_ANCHOR
from verifier.log_reading import LogEntry, SupervisorLog
from verifier.pinning import pinned
from verifier.policy import UNPINNED, ComponentPolicy, Policy, pins
from verifier.verdict import Check, equal, group, judge, unmade


def check_supervisor(log: SupervisorLog, config: str, policy: Policy) -> Check:
    """Every `Start` of the log; `config` is the canonical JSON text of the evidence."""
    id, title = "supervisor", "The supervisor, its plugins and its configuration"
    if not log.starts:
        return judge(
            id,
            title,
            holds=False,
            expected="a Start event that names them",
            actual="no Start event",
            anchor=LOG_ANCHOR,
        )
    checks = [_start(entry, event, policy) for entry, event in log.starts]
    checks += _config(log, config, policy)
    return group(id, title, checks)


def _start(entry: LogEntry, event: StartEvent, policy: Policy) -> Check:
    own = [component for component in event.components if component.role == "supervisor"]
    plugins = [component for component in event.components if component.role == "plugin"]
    checks: list[Check] = []
    if isinstance(policy.supervisor, str):
        checks.append(_unpinned("supervisor.component", "The supervisor", own, "supervisor"))
    else:
        checks += _components("component", own, {"supervisor": policy.supervisor})
    if isinstance(policy.plugins, str):
        checks.append(_unpinned("supervisor.plugin", "The plugins", plugins, "plugins"))
    else:
        expected = {f"plugins[{index}]": plugin for index, plugin in enumerate(policy.plugins)}
        checks += _components("plugin", plugins, expected)
    return group(
        "supervisor.start", f"Record {entry.position}: what the supervisor consists of", checks
    )


def _unpinned(id: str, what: str, components: list[Component], rule: str) -> Check:
    return unmade(
        id,
        f"{what} can be any program at all",
        why='the policy says "unpinned"',
        actual=", ".join(_described(component) for component in components) or "none",
        left_open=True,
        policy_rule=rule,
    )


def _components(
    kind: str, actual: list[Component], expected: Mapping[str, ComponentPolicy]
) -> Iterator[Check]:
    """One leaf for each expected component, and one for each that is there besides."""
    by_name = {component.name: component for component in actual}
    for rule, policy in expected.items():
        yield from _component(kind, by_name.pop(policy.name, None), policy, rule)
    for component in by_name.values():
        yield judge(
            f"supervisor.{kind}_unexpected",
            f"No {kind} runs that the policy does not expect",
            holds=False,
            expected="only the components of the policy",
            actual=_described(component),
            anchor=LOG_ANCHOR,
            policy_rule=next(iter(expected)).partition("[")[0],
        )


def _component(
    kind: str, component: Component | None, policy: ComponentPolicy, rule: str
) -> Iterator[Check]:
    fields = {"version": policy.version, "digest_sha384": policy.digest_sha384}
    checked = {name: value for name, value in fields.items() if value != UNPINNED}
    expected = ", ".join([policy.name, *(f"{name} {value}" for name, value in checked.items())])
    yield judge(
        f"supervisor.{kind}",
        f"The {kind} {policy.name} is the one expected",
        holds=component is not None
        and all(getattr(component, name) == value for name, value in checked.items()),
        expected=expected,
        actual="not there" if component is None else _described(component),
        anchor=LOG_ANCHOR,
        policy_rule=rule,
    )
    for name in fields.keys() - checked.keys():
        yield unmade(
            f"supervisor.{kind}_{name}",
            f"The {kind} {policy.name} can be any of that name ({name})",
            why='the policy says "unpinned"',
            actual="not there" if component is None else getattr(component, name),
            left_open=True,
            policy_rule=f"{rule}.{name}",
        )


def _described(component: Component) -> str:
    return f"{component.name}, version {component.version}, digest {component.digest_sha384}"


# --- configuration --------------------------------------------------------------------------


def _config(log: SupervisorLog, config: str, policy: Policy) -> Iterator[Check]:
    last_digest = log.starts[-1][1].config_digest_sha384
    yield equal(
        "supervisor.config_digest",
        "The configuration in the evidence is the one that was measured",
        expected=last_digest,
        actual=hashlib.sha384(config.encode()).hexdigest(),
        anchor=LOG_ANCHOR,
    )
    for entry, event in log.starts:
        yield pinned(
            "supervisor.config",
            f"Record {entry.position}: the configuration is the one expected",
            actual=event.config_digest_sha384,
            expected=policy.config.digest_sha384,
            anchor=LOG_ANCHOR,
            policy_rule="config.digest_sha384",
        )
        if event.config_digest_sha384 != last_digest and pins(policy.config.digest_sha384) is None:
            yield unmade(
                "supervisor.earlier_config",
                f"Record {entry.position}: an earlier configuration turned no check off",
                why="its text is not in the evidence, and the policy does not pin its digest",
                actual=event.config_digest_sha384,
                left_open=False,
                policy_rule="config.digest_sha384",
            )
    yield _unsafe(config, policy)


def _unsafe(config: str, policy: Policy) -> Check:
    title = "No check was turned off that the policy does not expressly allow to be"
    settings = unsafe_settings(config)
    allowed = policy.config.allow_unsafe
    if not settings:
        return judge(
            "supervisor.unsafe_settings",
            title,
            holds=True,
            expected=" or ".join(("none", *allowed)),
            actual="none",
            anchor=LOG_ANCHOR,
            policy_rule="config.allow_unsafe",
        )
    return group(
        "supervisor.unsafe_settings",
        title,
        [
            judge(
                "supervisor.unsafe_setting",
                title,
                holds=setting in allowed,
                expected=" or ".join(("none", *allowed)),
                actual=setting,
                anchor=LOG_ANCHOR,
                policy_rule="config.allow_unsafe",
            )
            for setting in settings
        ],
    )


def unsafe_settings(config: str) -> tuple[str, ...]:
    """Paths of all settings whose name begins with `unsafe_` and that are anything but false.

    Raises `FormatError` for a text that is no canonical JSON (none that was decoded is).
    """
    value = canonical_json.decode_canonical(
        config.encode(), item="config", max_bytes=MAX_CONFIG_BYTES
    )
    return tuple(sorted(_unsafe_paths(value, "")))


def _unsafe_paths(value: object, path: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, member in value.items():
            where = f"{path}.{key}" if path else key
            # None is a setting that was not made; an empty table or list may mean anything.
            if key.startswith("unsafe_") and member is not False and member is not None:
                yield where
            yield from _unsafe_paths(member, where)
    elif isinstance(value, list):
        for index, member in enumerate(value):
            yield from _unsafe_paths(member, f"{path}[{index}]")
