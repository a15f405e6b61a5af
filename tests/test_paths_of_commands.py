"""``~`` in the arguments of every command: a shell leaves it as it is in ``--out=~/x`` and in quotes."""

from __future__ import annotations

from argparse import ArgumentParser

import pytest

from ptq161.replay.__main__ import _parser as replay
from ptq161.report.__main__ import _parser as report
from ptq161.search.__main__ import _parser as search
from ptq161.watch.__main__ import _parser as watch


@pytest.mark.parametrize(
    ("parser", "arguments"),
    [
        (report(), ["~/runs", "~/more", "--out=~/out", "--published=~/published.csv"]),
        (search(), ["--out=~/out", "--space=~/space.yaml", "model.path='~/x'"]),
        (replay(), ["~/run", "--out=~/out"]),
        (watch(), ["~/run"]),
    ],
)
def test_home(monkeypatch: pytest.MonkeyPatch, parser: ArgumentParser, arguments: list[str]) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    values = [value for value in vars(parser.parse_args(arguments)).values() if value]
    paths = [path for value in values for path in (value if isinstance(value, list) else [value])]
    assert not [path for path in paths if str(path).startswith("~")]
    assert sum(str(path).startswith("/home/me/") for path in paths) == sum("='~" not in given for given in arguments)
