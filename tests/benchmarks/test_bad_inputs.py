"""Every bad input gets its sentence, and the benchmark that says so notices where one does not."""

from __future__ import annotations

import re
from types import ModuleType

import pytest

from tests.benchmarks.conftest import ROOT, script


@pytest.mark.slow
def test_every_bad_input_gets_its_sentence() -> None:
    ended = script("bad_inputs.py")
    assert ended.returncode == 0, ended.stderr
    count = re.search(r"^(\d+) bad inputs, 0 of them without the right sentence\.$", ended.stdout, re.MULTILINE)
    assert count is not None and int(count[1]) >= 100
    assert len(re.findall(r"^\| `", ended.stdout, re.MULTILINE)) == int(count[1])


def test_the_inputs_that_have_a_word_are_tried_alone() -> None:
    ended = script("bad_inputs.py", "ptq161.RTN", "group_size")
    assert ended.returncode == 0, ended.stderr
    assert "| `ptq161.RTN(bits=2, group_size=0)` | method.group_size=0: use at least 1" in ended.stdout
    assert ended.stdout.endswith("1 bad inputs, 0 of them without the right sentence.\n")


@pytest.fixture
def bad_inputs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bad_inputs

    module: ModuleType = bad_inputs
    return module


@pytest.mark.parametrize(
    ("status", "errors", "problems"),
    [
        (1, "seed=-1: use at least 0.\n", []),
        (1, "Error executing job with overrides: []\n\r 10%|#| 1/8\rseed=-1: use at least 0.\n", []),
        (0, "seed=-1: use at least 0.\n", ["exit status 0"]),
        (-9, "seed=-1: use at least 0.\n", ["exit status -9"]),
        (None, "seed=-1: use at least 0.\n", ["exit status None"]),
        (1, "", ["0 lines on stderr"]),
        (1, "A report.\nseed=-1: use at least 0.\n", ["2 lines on stderr"]),
        (1, "lr=-1: use at least 0.\n", ["does not match"]),
        (1, "Traceback (most recent call last):\nValueError: seed\n", ["traceback: ValueError: seed"]),
    ],
)
def test_what_is_no_sentence_is_a_problem(
    bad_inputs: ModuleType, status: int | None, errors: str, problems: list[str]
) -> None:
    found = list(bad_inputs._problems(bad_inputs.Case("ptq161 run seed=-1", "seed"), status, errors))
    assert len(found) == len(problems)
    assert all(problem in line for problem, line in zip(problems, found, strict=True))
