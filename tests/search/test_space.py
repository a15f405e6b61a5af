"""The space of a search: how it is read, its corners, and its values in the grammar of overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from ptq161.errors import UserError
from ptq161.run.command_line import as_value
from ptq161.search.__main__ import _DEFAULT_SPACE
from ptq161.search.space import _ends, contains, corners, load_space

PARSER = OverridesParser.create()


def space_file(folder: Path, text: str) -> Path:
    (folder / "space.yaml").write_text(text)
    return folder / "space.yaml"


def test_a_space_is_read_with_its_types(tmp_path: Path) -> None:
    text = "a: {low: 1, high: 8}\nb: {low: 1e-4, high: 1e-2, log: true}\nc: {choices: [x, 2, null, true]}\n"
    space = load_space(space_file(tmp_path, text))
    assert space == {
        "a": IntDistribution(1, 8),
        "b": FloatDistribution(1e-4, 1e-2, log=True),
        "c": CategoricalDistribution(["x", 2, None, True]),
    }
    assert [_ends(distribution) for distribution in space.values()] == [[1, 8], [1e-4, 1e-2], ["x", 2, None, True]]


def test_the_default_space_holds_the_default_settings() -> None:
    space = load_space(_DEFAULT_SPACE)
    assert {"mask_ratio", "method.epochs", "method.scale_lr", "method.angle_lr"} == set(space)
    point = {"mask_ratio": 0.2, "method.epochs": 4, "method.scale_lr": 0.001, "method.angle_lr": 0.01}
    assert contains(space, point)
    assert not contains(space, {**point, "mask_ratio": 0.9}) and not contains(space, {"mask_ratio": 0.2})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty"),
        ("a: [", "cannot be read"),
        ("a: 3", "a of --space .*: 3 is not a range"),
        ("a: {low: 1}", "is not a range"),
        ("a: {low: 1, high: 2, step: 1}", "is not a range"),
        ("a: {choices: []}", "is no list of values"),
        ("a: {choices: [[1]]}", r"the choice \[1\] is not a plain value"),
        ("a: {low: 2, high: 1}", "low: 2 is not below high: 1"),
        ("a: {low: x, high: 1}", "are not two numbers"),
        ("a: {low: 0, high: 1, log: true}", "low: 0 has no logarithm"),
        ("a: {low: 1, high: 2, log: 7}", "neither true nor false"),
        ("a: {low: .nan, high: 1.0}", "not below"),
    ],
)
def test_a_wrong_space_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_space(space_file(tmp_path, text))
    with pytest.raises(UserError, match="cannot be read"):
        load_space(tmp_path / "nowhere.yaml")


def test_every_end_is_a_corner_beside_the_first_and_the_last_of_the_others() -> None:
    space = {"a": CategoricalDistribution(["x", "y", "z"]), "b": IntDistribution(1, 8)}
    found = [tuple(corner.values()) for corner in corners(space)]
    assert found == [("x", 1), ("y", 1), ("z", 1), ("x", 8), ("y", 8), ("z", 8)]


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)


@given(plain | st.text(st.characters(codec="ascii", exclude_characters="$", min_codepoint=32)))
def test_hydra_reads_a_value_as_it_was(value: Any) -> None:
    if isinstance(value, str) and as_value(value) == value:
        return  # unquoted text means what it means on the command line
    read = PARSER.parse_override(f"key={as_value(value)}").value()
    assert str(read) == value if isinstance(value, str) else (read == value and type(read) is type(value))
