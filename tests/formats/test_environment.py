from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.formats.environment import check_environment_rule, resolve_environment
from supervisor.formats.errors import FormatError, PolicyDenied


def denied(rules: list[str], *requested: str) -> PolicyDenied:
    with pytest.raises(PolicyDenied) as caught:
        resolve_environment(rules, requested)
    return caught.value


# --- the six examples of the specification -----------------------------------------------------


def test_example_1_one_value_is_the_only_value_and_the_default() -> None:
    rules = ["ABC=xyz"]
    assert resolve_environment(rules, []) == ("ABC=xyz",)
    assert resolve_environment(rules, ["ABC=xyz"]) == ("ABC=xyz",)
    assert denied(rules, "ABC=uvw").item == "environment[0]"
    assert denied(rules, "ABC=").expected == "ABC=xyz"


def test_example_2_the_first_of_several_values_is_the_default() -> None:
    rules = ["ABC=xyz", "ABC=uvw"]
    assert resolve_environment(rules, []) == ("ABC=xyz",)
    assert resolve_environment(rules, ["ABC=uvw"]) == ("ABC=uvw",)
    assert resolve_environment(rules, ["ABC=xyz"]) == ("ABC=xyz",)
    assert denied(rules, "ABC=rst").expected == "ABC=uvw or ABC=xyz"
    denied(rules, "ABC=")


def test_example_3_unset_first_is_the_default() -> None:
    rules = ["ABC=", "ABC=xyz", "ABC=uvw"]
    assert resolve_environment(rules, []) == ()
    assert resolve_environment(rules, ["ABC="]) == ()
    assert resolve_environment(rules, ["ABC=xyz"]) == ("ABC=xyz",)
    assert resolve_environment(rules, ["ABC=uvw"]) == ("ABC=uvw",)
    assert denied(rules, "ABC=rst").expected == "ABC unset or ABC=uvw or ABC=xyz"


def test_example_4_a_bare_name_takes_any_value_and_is_unset_by_default() -> None:
    rules = ["HTTPS_PROXY"]
    assert resolve_environment(rules, []) == ()
    assert resolve_environment(rules, ["HTTPS_PROXY="]) == ()
    assert resolve_environment(rules, ["HTTPS_PROXY=a=b"]) == ("HTTPS_PROXY=a=b",)


@pytest.mark.parametrize("order", [1, -1])
def test_example_5_a_bare_name_with_a_default(order: int) -> None:
    rules = ["HTTPS_PROXY", "HTTPS_PROXY=http://proxy.example.com:80/"][::order]
    assert resolve_environment(rules, []) == ("HTTPS_PROXY=http://proxy.example.com:80/",)
    assert resolve_environment(rules, ["HTTPS_PROXY=x"]) == ("HTTPS_PROXY=x",)
    assert resolve_environment(rules, ["HTTPS_PROXY="]) == ()


def test_example_6_unset_may_be_asked_for_though_a_value_is_the_default() -> None:
    rules = ["ABC=xyz", "ABC=uvw", "ABC="]
    assert resolve_environment(rules, []) == ("ABC=xyz",)
    assert resolve_environment(rules, ["ABC="]) == ()
    assert resolve_environment(rules, ["ABC=uvw"]) == ("ABC=uvw",)
    denied(rules, "ABC=rst")


# --- requests ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_text",
    ["", "A", "=", "=x", "A=x\0", "A\0=x", "A=x\n", "A=x\nB=y", "A\nB=x", "A=\ud800"],
)
def test_a_request_in_another_form_is_refused_even_for_an_unconstrained_name(
    request_text: str,
) -> None:
    rules = ["A", "A\nB", "B"]
    with pytest.raises(PolicyDenied) as caught:
        resolve_environment(rules, ["B=1", request_text])
    assert caught.value.item == "environment[1]"


def test_a_name_without_a_rule_is_refused() -> None:
    assert "no rule" in denied(["A"], "a=1").rule
    denied(["A=1"], "A =1")
    denied(["AB"], "A=1")
    denied([], "A=")


@pytest.mark.parametrize("second", ["A=1", "A=2", "A="])
def test_a_name_requested_twice_is_refused(second: str) -> None:
    error = denied(["A"], "A=1", second)
    assert (error.item, error.actual) == ("environment[1]", "A")


def test_the_result_is_sorted_by_name() -> None:
    rules = ["B=1", "a=2", "A-=3", "A=4", "AB=5"]
    assert resolve_environment(rules, []) == ("A=4", "A-=3", "AB=5", "B=1", "a=2")


def test_the_value_may_hold_equals_signs() -> None:
    assert resolve_environment(["A=b=c"], ["A=b=c"]) == ("A=b=c",)
    denied(["A=b=c"], "A=b")


@pytest.mark.parametrize("rule", ["", "=", "=x", "A=\0", "\0", "A\0B"])
def test_a_rule_in_another_form_is_refused(rule: str) -> None:
    with pytest.raises(FormatError) as caught:
        check_environment_rule(rule, item="$.env[3]")
    assert caught.value.item == "$.env[3]"
    with pytest.raises(FormatError):
        resolve_environment(["B", rule], [])


# --- against a model ---------------------------------------------------------------------------

_rules = st.lists(
    st.tuples(st.sampled_from("ABC"), st.sampled_from([None, "", "x", "y"])), max_size=7
)
_requests = st.lists(
    st.tuples(st.sampled_from("ABCD"), st.sampled_from(["", "x", "y", "z"])), max_size=4
)


@given(_rules, _requests)
def test_it_agrees_with_the_specification_read_name_by_name(
    rules: list[tuple[str, str | None]], requests: list[tuple[str, str]]
) -> None:
    texts = [name if value is None else f"{name}={value}" for name, value in rules]
    expected: list[str] | None = []
    names = [name for name, _ in requests]
    if len(set(names)) != len(names):
        expected = None
    for name in "ABCD":
        mine = [value for n, value in rules if n == name]
        defaults = [value for value in mine if value is not None]
        value = defaults[0] if defaults else ""
        for requested_name, requested in requests:
            if requested_name == name:
                if requested not in mine and None not in mine:
                    expected = None
                value = requested
        if expected is not None and value:
            expected.append(f"{name}={value}")
    requested_texts = [f"{name}={value}" for name, value in requests]
    if expected is None:
        denied(texts, *requested_texts)
    else:
        assert resolve_environment(texts, requested_texts) == tuple(expected)
        assert resolve_environment(texts, requested_texts[::-1]) == tuple(expected)
