"""Reading YAML: every value knows its place, and no document can do harm."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt.core import yaml
from apt.core.yaml import parse_value, read_file, read_text
from apt.errors import ProfileError

SCALARS = st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False)
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=12)
VALUES = st.recursive(
    SCALARS | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(WORDS, VALUES, max_size=5))
def test_what_is_written_is_read_back(values: dict[str, object]) -> None:
    assert read_text(yaml.dump(values), "x").values == values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-5", 3e-5),
        ("3E5", 3e5),
        (".5", 0.5),
        ("-1.", -1.0),
        ("012", 12),
        ("0x1f", 31),
        ("0o17", 15),
        ("true", True),
        ("True", True),
        ("on", "on"),
        ("yes", "yes"),
        ("NO", "NO"),
        ("null", None),
        ("~", None),
        ("", None),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("2026-11-23", "2026-11-23"),
        (".inf", ".inf"),
        (".nan", ".nan"),
        ("'3e-5'", "3e-5"),
        ('"true"', "true"),
        ("[1, two, 3.0]", [1, "two", 3.0]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
    ],
)
def test_scalars_are_read_by_yaml_1_2(text: str, value: object) -> None:
    seen = parse_value(text)
    assert seen == value
    assert type(seen) is type(value)


def test_every_value_knows_its_place() -> None:
    source = read_text("a: 1\nb:\n  c: [x, {d: 2}]\n", "f.yaml")
    assert str(source.origins[("a",)]) == "f.yaml:1:4"
    assert str(source.origins[("b", "c", 1, "d")]) == "f.yaml:3:14"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x 1\nb: *x\n", r"f:2:4: aliases \(\*name\) are not allowed"),
        ("a: !!python/object:os.system x\n", r"f:1:4: the tag .*python/object:os.system is not allowed"),
        ("a: !mine {b: 1}\n", r"f:1:4: the tag !mine is not allowed"),
        ("a: 1\na: 2\n", r"f:2:1: the key 'a' stands twice"),
        ("a: {b: 1, b: 2}\n", r"f:1:11: the key 'b' stands twice"),
        ("<<: {a: 1}\n", r"merge keys \(<<\) are not allowed"),
        ("a: 1\n---\nb: 2\n", r"f:2:1: a second document begins"),
        ("[1, 2]\n", r"f: holds no mapping"),
        ("", r"f: holds no mapping"),
        ("just words\n", r"f: holds no mapping"),
        ("? [a, b]\n: 1\n", r"f:1:3: a key must be a word"),
        ("a: [1, 2\n", r"f:2:1: "),
        ("a: b: c\n", r"f:1:5: mapping values are not allowed"),
        ("a:\n\t- 1\n", r"f:2:1: .*; YAML is indented with spaces, and here is a tab"),
        ("a: [1,", r"f:2:1: [^;]*$"),
        ("a: " + "[" * 60 + "]" * 60, r"f:1:4\d: nested deeper than 40 levels"),
        ("a: 1\nb: 1\x00\n", r"f:2:5: the control character '\\x00' is not allowed; take it out"),
        ("a: ${APT_TEST_NOT_SET}\n", r"f:1:4: the environment has no APT_TEST_NOT_SET; set it, or write"),
        ("a: " + "9" * 5000, r"f:1:4: "),
    ],
)
def test_what_is_no_profile_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        read_text(text, "f")


def test_a_bomb_of_aliases_costs_nothing() -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    with pytest.raises(ProfileError, match=r"f:2:10: aliases"):  # at the first, before anything is multiplied
        read_text("\n".join(lines), "f")


def test_deep_nesting_ends_before_the_stack_does() -> None:
    for text in ("{a: " * 100_000, "[" * 100_000, "- " * 100_000, "".join(" " * n + "a:\n" for n in range(300))):
        with pytest.raises(ProfileError):
            read_text(text, "f")


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"k{n}: 1\n" for n in range(90_000)),
        "plugins: [" + ", ".join(f"m{n}" for n in range(100_000)) + "]\n",
        "training: {betas: [" + "1," * 300_000 + "]}\n",
        "schedules:\n" + "".join(f"  enable_m{n}_at_epoch: 1\n" for n in range(30_000)),
    ],
    ids=["keys", "plugins", "numbers", "switches"],
)
def test_a_document_of_very_many_values_is_refused_before_it_costs_much(text: str) -> None:
    with pytest.raises(ProfileError, match="more than 4000 values; a profile has fewer"):
        read_text(text, "f")


def test_a_file_without_an_end_is_refused() -> None:
    with pytest.raises(ProfileError, match="does not end; a profile has at most 1000000 bytes"):
        read_file(Path("/dev/zero"))


@pytest.mark.parametrize("number", ["1e999", "-1e999", "9" * 5000, "0x" + "f" * 17, "9223372036854775808"])
def test_a_number_that_no_computer_has_is_refused(number: str) -> None:
    with pytest.raises(ProfileError, match="is too large a number; integers have 64 bits"):
        read_text(f"a: {number}\n", "f")
    assert read_text(f"a: '{number}'\n", "f").values == {"a": number}
    assert read_text("a: 9223372036854775807\n", "f").values == {"a": 2**63 - 1}


def test_a_file_of_100_mb_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "big.yaml"
    with path.open("wb") as file:
        file.truncate(100_000_000)
    with pytest.raises(ProfileError, match="is 100000000 bytes; a profile has at most 1000000"):
        read_file(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: café\n".encode("latin-1"), r"is not UTF-8 \(byte 9\); save it as UTF-8"),
        ("name: x\n".encode("utf-16"), r"is not UTF-8"),
        (b"name: \xff\n", r"is not UTF-8"),
        (b"name: a\x00b\n", r"x.yaml"),
    ],
)
def test_what_is_not_utf_8_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(ProfileError, match=message):
        read_file(path)


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbfname: x\r\nversion: '2'\r\n")
    assert read_file(path).values == {"name": "x", "version": "2"}


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"nope\.yaml: cannot be read: No such file"):
        read_file(tmp_path / "nope.yaml")
    with pytest.raises(ProfileError, match="cannot be read: Is a directory"):
        read_file(tmp_path)


def test_variables_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APT_TEST_SIZE", "64")
    monkeypatch.delenv("APT_TEST_OTHER", raising=False)
    text = (
        "a: ${APT_TEST_SIZE}\nb: ${APT_TEST_OTHER:-3e-4}\nc: x-${APT_TEST_SIZE}\nd: \"${APT_TEST_SIZE}\"\ne: '${X}'\n"
    )
    assert read_text(text, "f").values == {"a": 64, "b": 3e-4, "c": "x-64", "d": "64", "e": "${X}"}


def test_beginnings_of_variables_without_an_end_are_text_and_cost_nothing() -> None:
    text = "${HOME:-" * 100_000
    assert read_text(f"a: {text}\n", "f").values == {"a": text}


def test_a_variable_cannot_smuggle_in_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APT_TEST_EVIL", "{b: 1}\nc: 2")
    assert read_text("a: ${APT_TEST_EVIL}\n", "f").values == {"a": os.environ["APT_TEST_EVIL"]}


@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda raw: raw.decode("latin-1")))
def test_any_text_is_a_mapping_or_an_error_of_ours(text: str) -> None:
    with suppress(ProfileError):
        assert isinstance(read_text(text, "f").values, dict)
