from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugins.image_store.registry.challenge import Challenge, parse_challenges
from supervisor.formats.errors import FormatError

TOKENS = st.text("abcXYZ019-_.!", min_size=1, max_size=8)
VALUES = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=20)


def test_a_bearer_challenge_as_registries_send_it() -> None:
    line = (
        'Bearer realm="https://auth.example.org/token",service="registry.example.org",'
        'scope="repository:team/app:pull,push"'
    )
    assert parse_challenges([line]) == (
        Challenge(
            "bearer",
            {
                "realm": "https://auth.example.org/token",
                "service": "registry.example.org",
                "scope": "repository:team/app:pull,push",
            },
        ),
    )


@pytest.mark.parametrize(
    "lines",
    [
        ['Basic realm="a, b=c", charset=UTF-8, Negotiate, NTLM YWJj==, bearer Realm = "x\\"y"'],
        ['Basic realm="a, b=c", charset=UTF-8', "Negotiate", "NTLM YWJj==", 'bearer Realm="x\\"y"'],
        [',, Basic realm="a, b=c" ,charset=UTF-8,,Negotiate,NTLM YWJj==,bearer Realm="x\\"y",'],
    ],
)
def test_several_challenges_are_told_apart_however_they_are_laid_out(lines: list[str]) -> None:
    assert parse_challenges(lines) == (
        Challenge("basic", {"realm": "a, b=c", "charset": "UTF-8"}),
        Challenge("negotiate", {}),
        Challenge("ntlm", {}),
        Challenge("bearer", {"realm": 'x"y'}),
    )


@pytest.mark.parametrize(
    "line",
    [
        'Bearer realm="unclosed',
        'Bearer realm="a" service="b"',
        'Bearer realm="a",realm="b"',
        'realm="a"',
        "Bäsic",
        "Basic\x00",
        "Basic realm=" + "a" * 9000,
    ],
)
def test_malformed_challenges_are_refused(line: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_challenges([line])
    assert caught.value.item == "www-authenticate"


def test_no_header_is_no_challenge() -> None:
    assert parse_challenges([]) == ()


@given(st.lists(st.text(max_size=60), max_size=3))
def test_no_header_makes_the_parser_fail_otherwise(lines: list[str]) -> None:
    try:
        parse_challenges(lines)
    except FormatError as error:
        assert error.item == "www-authenticate"


@given(st.text('Basic rélm="\\,= \t', max_size=40))
def test_no_header_of_its_own_characters_does_either(line: str) -> None:
    try:
        found = parse_challenges([line])
    except FormatError:
        return
    assert all(one.scheme for one in found)


@given(
    st.lists(
        st.tuples(TOKENS, st.dictionaries(TOKENS.map(str.lower), VALUES, max_size=3)), max_size=3
    )
)
def test_what_was_written_is_read(challenges: list[tuple[str, dict[str, str]]]) -> None:
    written = []
    for scheme, parameters in challenges:
        quoted = (
            '{}="{}"'.format(name, value.replace("\\", "\\\\").replace('"', '\\"'))
            for name, value in parameters.items()
        )
        written.append(f"{scheme} {', '.join(quoted)}".rstrip())
    assert parse_challenges(written) == tuple(
        Challenge(scheme.lower(), parameters) for scheme, parameters in challenges
    )
