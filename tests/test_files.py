"""Reading untrusted JSON and YAML."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrim.files import parse_json, parse_yaml

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=20,
)


@given(VALUES)
def test_json_gives_what_was_written(value):
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' twice"),
        ('[{"b": {"c": 1, "d": 2, "c": 1}}]', "the key 'c' twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ('{"a": "\\ud800"}', "surrogate"),
        ('{"\\udfff": 1}', "surrogate"),
        (b'"\xff"', "not UTF-8"),
        ("{", "not JSON"),
        ("", "not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "holds a number of 5000 digits"),
    ],
)
def test_json_that_is_refused(content, said):
    with pytest.raises(ValueError, match=said):
        parse_json(content)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: 1\nb: 2\na: 3", "the key 'a' twice"),
        ("x: {y: {1: a, 1: b}}", "the key 1 twice"),
        ("[" * 100_000, "nested too deeply"),
        ("a: [", "not YAML"),
        (b"a: \xff", "not YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not YAML"),
        ("? [1, 2]\n: 3", "not YAML"),
        ("a: 2026-13-45", "not YAML"),
        ("a: " + "9" * 5000, "not YAML"),
    ],
)
def test_yaml_that_is_refused(content, said):
    with pytest.raises(ValueError, match=said):
        parse_yaml(content)


def test_yaml_with_merged_keys_is_legal():
    assert parse_yaml("base: &b {x: 1, y: 2}\nmine: {<<: *b, y: 3}")["mine"] == {"x": 1, "y": 3}


@pytest.mark.parametrize("text", ["1e-3", "-2E+4", ".5e1", "1.e2", "3.25e-1"])
def test_yaml_reads_every_decimal_number(text):
    assert parse_yaml(f"a: {text}") == {"a": float(text)}
    assert parse_yaml("[1e, e3, 1e3x, x1e3]") == ["1e", "e3", "1e3x", "x1e3"]
