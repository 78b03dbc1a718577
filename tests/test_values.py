"""Values of a type, from YAML and from words of a command line, and what is said of the others."""

from typing import Any, Literal

import pytest

from rawloop.values import WrongValue, in_words, items_of_text, of_text, shown, typed

Mode = Literal["off", "warn"]
NUMBERS = [("1", 1.0), ("1e-5", 1e-5), ("-.5", -0.5), ("2.", 2.0), ("+3E2", 300.0), ("1_000", 1000.0), (" 3 ", 3.0)]


@pytest.mark.parametrize(("text", "value"), NUMBERS)
def test_numbers_of_a_command_line(text: str, value: float) -> None:
    read = of_text(text, float)
    assert read == value
    assert type(read) is float


@pytest.mark.parametrize("text", ["", "nan", "1e", "e5", "0x10", "1:30", "1__0", "٣", "1 0", "true", "null", "_1"])
@pytest.mark.parametrize("hint", [float, int])
def test_texts_that_are_no_numbers(text: str, hint: Any) -> None:
    with pytest.raises(WrongValue, match=r"^it must be a "):
        of_text(text, hint)


@pytest.mark.parametrize(("text", "value"), [("1", 1), ("-3", -3), ("+3", 3), ("010", 10), ("1_000", 1000)])
def test_whole_numbers_of_a_command_line(text: str, value: int) -> None:
    assert of_text(text, int) == value


@pytest.mark.parametrize("value", ["1.0", "1e3", 1.0, True, None, [1], "9" * 5000])
def test_what_is_no_whole_number(value: Any) -> None:
    with pytest.raises(WrongValue, match=r"^it must be a whole number$"):
        typed(value, int)


def test_numbers_that_are_too_large() -> None:
    assert typed(2**63 - 1, int) == 2**63 - 1
    assert typed(10**20, float) == 1e20
    for value, hint in ((2**63, int), (str(-(2**63)), int), (10**400, float)):
        with pytest.raises(WrongValue, match=r"of at most 63 bits|below 1e308"):
            typed(value, hint)


@pytest.mark.parametrize(
    ("value", "hint", "result"),
    [
        (3, float, 3.0),
        ("1e-5", float, 1e-5),
        ("7", int, 7),
        ("OFF", bool, False),
        ("yes", bool, True),
        ("off", Mode, "off"),
        (None, int | None, None),
        ("x", str | None, "x"),
        ("auto", bool | Literal["auto"], "auto"),
        ("no", bool | Literal["auto"], False),
        ([1, "2"], list[float], [1.0, 2.0]),
        (["warn"], list[Mode] | None, ["warn"]),
        ({"a": "1"}, dict[str, float], {"a": 1.0}),
    ],
)
def test_values_of_a_file(value: Any, hint: Any, result: Any) -> None:
    assert typed(value, hint) == result
    assert type(typed(value, hint)) is type(result)


@pytest.mark.parametrize(
    ("value", "hint", "why"),
    [
        (1, bool, "it must be true or false"),
        (True, float, "it must be a number"),
        (False, Mode, "it must be one of 'off', 'warn'"),
        (3, str, "it must be a string: put it in quotes"),
        ("a\0b", str, "it has characters that no text has"),
        ("\ud800", str | None, "it has characters that no text has"),
        ("x", list[str], "it must be a list such as '[a, b]'"),
        ("x", list[Mode], "it must be a list such as '[a, b]' of 'off', 'warn'"),
        (["x"], list[Mode], "'x' in it must be one of 'off', 'warn'"),
        ([None], list[str], "'None' in it must be a string: put it in quotes"),
        (["a\0"], list[str], "'a\\x00' in it has characters that no text has"),
        ({"a": "b"}, dict[str, float], "'b' of a must be a number"),
        ([], dict[str, float], "it must be keys and values such as '{a: 1, b: 2}'"),
        ("maybe", bool | Literal["auto"], "it must be true or false or 'auto'"),
    ],
)
def test_what_is_said_of_wrong_values(value: Any, hint: Any, why: str) -> None:
    with pytest.raises(WrongValue) as caught:
        typed(value, hint)
    assert str(caught.value) == why


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("null", str | None, None),
        ("~", float | None, None),
        ("NULL", list[str] | None, None),
        ("null", str, "null"),
        ("None", str | None, "None"),
        ("#x", str | None, "#x"),
        ("[a: b", str, "[a: b"),
        ("", str, ""),
        ("[a, '*.b']", list[str], ["a", "*.b"]),
        ("[]", list[str], []),
        ("[off]", list[Mode], ["off"]),
        ("{a: 1e-5}", dict[str, float], {"a": 1e-5}),
    ],
)
def test_words_of_a_command_line(text: str, hint: Any, value: Any) -> None:
    assert of_text(text, hint) == value


@pytest.mark.parametrize("text", ["", "a", "[", "[a, b", "*", "&a [*a]", "[[a]]", "{a: 1}", "#x", "[" * 2000, "[010]"])
def test_words_that_are_no_list(text: str) -> None:
    for hint in (list[str], list[str] | None):
        with pytest.raises(WrongValue, match=r"it must be a list|in it must be a string"):
            of_text(text, hint)


def test_items_are_those_of_a_list_or_the_word() -> None:
    assert items_of_text("[a, b]", list[str]) == ["a", "b"]
    assert items_of_text("a b", list[str]) == ["a b"]
    assert items_of_text("null", list[str] | None) == []
    with pytest.raises(WrongValue, match="'x' in it must be one of"):
        items_of_text("x", list[Mode])


def test_types_in_words() -> None:
    assert in_words(float | None) == "a number"
    assert in_words(list[Mode] | None) == "a list such as '[a, b]' of 'off', 'warn'"


def test_a_value_is_shown_in_one_line() -> None:
    assert shown("a b") == "'a b'"
    assert shown("a\nb") == r"'a\nb'"
    assert shown([1, "x"]) == "'[1, 'x']'"
    assert len(shown("x" * 5000)) < 130
