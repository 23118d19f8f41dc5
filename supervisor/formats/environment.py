"""Which environment a container gets (ACON image spec 1.0, "Environment variables").

A manifest's `env` lists rules; whoever starts the image requests values and is not
trusted. Pure, because the verifier repeats it.
"""

from __future__ import annotations

from collections.abc import Sequence

from supervisor.formats.errors import FormatError, PolicyDenied

_SHOWN_CHARACTERS = 160


def check_environment_rule(rule: str, *, item: str) -> None:
    """Refuse a rule that is not `NAME=VALUE`, `NAME=` or `NAME`. Raises `FormatError`."""
    if not rule or rule.startswith("=") or "\0" in rule:
        raise FormatError(
            item,
            "an environment rule is NAME=VALUE, NAME= or NAME, without NUL",
            actual=repr(rule[:_SHOWN_CHARACTERS]),
        )


def resolve_environment(rules: Sequence[str], requested: Sequence[str]) -> tuple[str, ...]:
    """What the container gets: `NAME=VALUE` strings sorted by name, each name once.

    `rules` are the manifest's, in its order. `requested` are `NAME=VALUE`, or `NAME=` to
    ask that NAME be unset. A request is accepted when any rule for its name allows it. A
    name not requested takes the first rule for it that has an `=`; without one it is unset.

    Raises `PolicyDenied` whose item is `environment[i]`, the request that is not allowed,
    and `FormatError` for rules that no parsed manifest holds.
    """
    allowed: dict[str, set[str]] = {}
    unconstrained: set[str] = set()
    environment: dict[str, str] = {}
    for index, rule in enumerate(rules):
        check_environment_rule(rule, item=f"env[{index}]")
        name, equals, value = rule.partition("=")
        values = allowed.setdefault(name, set())
        if not equals:
            unconstrained.add(name)
        else:
            if not values:
                environment[name] = value
            values.add(value)
    seen: set[str] = set()
    for index, request in enumerate(requested):
        name, value = _parse_request(request, item=f"environment[{index}]")
        if name in seen:
            raise PolicyDenied(
                f"environment[{index}]",
                "a name must be requested once",
                actual=name[:_SHOWN_CHARACTERS],
            )
        seen.add(name)
        if name not in unconstrained and value not in allowed.get(name, ()):
            raise _denied(index, request, name, allowed)
        environment[name] = value
    # An empty value is the request, or the default, that the name be unset.
    return tuple(f"{name}={value}" for name, value in sorted(environment.items()) if value)


def _parse_request(request: str, *, item: str) -> tuple[str, str]:
    name, equals, value = request.partition("=")
    shown = repr(request[:_SHOWN_CHARACTERS])
    if not name or not equals:
        raise PolicyDenied(item, "a request is NAME=VALUE, or NAME= to unset", actual=shown)
    if "\0" in request or "\n" in request:
        raise PolicyDenied(item, "a request must not hold NUL or newline", actual=shown)
    try:
        request.encode()
    except UnicodeEncodeError:
        raise PolicyDenied(item, "a request must be text in UTF-8", actual=shown) from None
    return name, value


def _denied(index: int, request: str, name: str, allowed: dict[str, set[str]]) -> PolicyDenied:
    item = f"environment[{index}]"
    actual = request[:_SHOWN_CHARACTERS]
    if name not in allowed:
        return PolicyDenied(item, "no rule of the manifest allows this name", actual=actual)
    choices = " or ".join(
        f"{name}={value}" if value else f"{name} unset" for value in sorted(allowed[name])
    )
    return PolicyDenied(
        item,
        "no rule of the manifest allows this value",
        expected=choices[: 4 * _SHOWN_CHARACTERS],
        actual=actual,
    )
