"""Settings as they are typed: what is rejected is shown quoted, and a range has the values that were meant."""

from __future__ import annotations

import math
import re
import shlex
from fractions import Fraction
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import given
from hypothesis import strategies as st

from ptq161.errors import UserError
from ptq161.run.command_line import check_arguments, exact_range, sentence_of
from ptq161.run.conf import CONF

PARSER = OverridesParser.create()


def refused(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        check_arguments(arguments)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


@pytest.mark.parametrize(
    "value",
    [
        "~/x",
        "~user/x",
        "/a=b/c",
        "a=b=c",
        "é",
        "/größe/x",
        "a(b)",
        "a)b",
        "a#b",
        "it's",
        "a\\'b",
        "模型",
        "a&b",
        "x;y",
        "!a",
    ],
)
def test_a_value_with_special_characters_is_shown_as_it_should_be_typed(value: str) -> None:
    sentence = refused("seed=1", f"model.path={value}", "-m")
    typed = sentence.split(": quote the value, ")[1].removesuffix(".")
    (setting,) = shlex.split(typed)  # what the shell makes of it
    assert check_arguments([setting]) == [setting]
    assert read(setting) == value


@pytest.mark.parametrize(
    ("typed", "given"),
    [
        ("method=rtn,gptq method.bits=3", "method=rtn,gptq method.bits=choice(3)"),
        ("method=rtn,gptq method.group_size=null seed=1", "method=rtn,gptq method.group_size=null seed=1"),
        ("preprocess=a,b preprocess.text_file='my text'", "preprocess=a,b preprocess.text_file=choice('my text')"),
        ("eval=ppl,both eval.corpora=[squad,boolq]", "eval=ppl,both eval.corpora=choice([squad,boolq])"),
        ("method=rtn,gptq method.bits=2,3", "method=rtn,gptq method.bits=2,3"),
        ("method=rtn,gptq ++method.bits=3", "method=rtn,gptq ++method.bits=3"),
        ("method=rtn,gptq method.name=", "method=rtn,gptq method.name="),
        ("method=rtn method.bits=3 seed=0,1", "method=rtn method.bits=3 seed=0,1"),
    ],
)
def test_a_key_of_a_swept_group_is_given_to_each_job(typed: str, given: str) -> None:
    def words(text: str) -> list[str]:
        return re.split(r" (?=[a-z+_.]+=)", text)

    assert check_arguments(["-m", *words(typed)]) == ["-m", *words(given)]
    assert "choice" not in " ".join(check_arguments([word for word in words(typed) if "," not in word]))


@given(st.text(st.characters(codec="utf-8", exclude_characters="$,[]{}\n", exclude_categories=["C", "Z"]), min_size=1))
def test_what_is_shown_can_be_typed(value: str) -> None:
    try:
        check_arguments([f"model.path={value}"])
    except UserError as error:
        _, found, typed = str(error).partition(": quote the value, ")
        if not found:
            assert value[0] in "'\"" or "(" in value
            return
        assert read(*shlex.split(typed.removesuffix("."))) == value


def read(setting: str) -> str:
    return str(PARSER.parse_override(setting).value())


def test_each_value_of_a_sweep_is_quoted() -> None:
    assert refused("-m", "model.path=~/a,b,~/c").endswith(" quote the value, \"model.path='~/a',b,'~/c'\".")
    assert refused("model.path=~/a,b").endswith(" quote the value, \"model.path='~/a,b'\".")


@pytest.mark.parametrize("argument", ["mask_ratio", "", "=3", "méthod=rtn", "a b=1", "=", "==", "?"])
def test_what_is_no_setting(argument: str) -> None:
    assert refused("seed=1", argument).startswith(f"{argument!r} is no setting: use KEY=VALUE; ")


@pytest.mark.parametrize("value", ["[boolq", "[boolq]]", "range(1", "{a:1", "choice(a,b"])
def test_brackets(value: str) -> None:
    assert "close its brackets" in refused(f"eval.corpora={value}")


def test_quotes() -> None:
    assert "close its quotes" in refused("model.path='abc")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--help"],
        ["-m", "seed=0,1", "++a.b=c", "~method", "+study=baselines", "method@x=rtn"],
        ["--cfg", "job", "seed=1"],
        ["--config-dir", "~/x", "seed=1"],
        ["--shell-completion", "query=~"],
        ["hydra.run.dir=x", "hydra.run.dir=${now:%Y}/a b"],
    ],
)
def test_what_hydra_reads_is_passed_on(arguments: list[str]) -> None:
    assert check_arguments(arguments) == arguments


def test_the_folders_of_records_may_be_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me o'k")
    given = ["hydra.run.dir='~/x'", "hydra.sweep.dir='~'", "hydra.run.dir='a/~'"]
    assert [read(setting) for setting in check_arguments(given)] == ["/home/me o'k/x", "/home/me o'k", "a/~"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("range(0.1,0.4,0.1)", "0.1,0.2,0.3"),
        ("range(0,0.9,0.3)", "0.0,0.3,0.6"),
        ("range(0.3,0,-0.1)", "0.3,0.2,0.1"),
        ("range(0.7)", "0.0"),
        ("range(1e-5,4e-5,1e-5)", "1e-05,2e-05,3e-05"),
        ("range(1,2,0.25)", "1.0,1.25,1.5,1.75"),
        ("float(range(1,3))", "1.0,2.0"),
        ("shuffle(range(0.1,0.4,0.1))", "shuffle(0.1,0.2,0.3)"),
        ("range(0,4)", "range(0,4)"),
        ("choice(0.30000000000000004,1)", "choice(0.30000000000000004,1)"),
        ("0.30000000000000004", "0.30000000000000004"),
        ("interval(0.1,0.4)", "interval(0.1,0.4)"),
        ("a,b", "a,b"),
    ],
)
def test_a_range_has_the_values_that_were_meant(typed: str, meant: str) -> None:
    assert exact_range(f"+mask_ratio={typed}") == f"+mask_ratio={meant}"


@given(st.integers(-50, 50), st.integers(1, 60), st.integers(1, 30), st.integers(1, 4), st.booleans())
def test_every_range_is_that_of_the_decimals(start: int, length: int, step: int, places: int, down: bool) -> None:
    sign = -1 if down else 1
    numbers = [Fraction(n, 10**places) for n in (start, start + sign * length, sign * step)]
    typed = ",".join(str(float(number)) for number in numbers)
    values = exact_range(f"k=range({typed})").partition("=")[2].split(",")
    expected = [float(numbers[0] + i * numbers[2]) for i in range(math.ceil(length / step))]
    assert [float(value) for value in values] == expected


@pytest.mark.parametrize("typed", ["range(0.4,0.1,0.1)", "range(4,1)", "range(0.1,0.4,0)", "range(1,1)"])
def test_a_range_without_values_is_refused(typed: str) -> None:
    with pytest.raises(UserError, match=r"^k=range\(.*\): the range has no values; use range\(START,STOP,STEP\), "):
        exact_range(f"k={typed}")


@pytest.mark.parametrize(
    ("override", "beginning"),
    [
        ("method=nonsense", "method=nonsense: there is no such option; use one of awq, billm, "),
        ("nonsense=1", "unknown key nonsense: known are block_size, cache, "),
        ("method.nonsense=1", "unknown key method.nonsense: known are "),
        (
            "eval.corpora=a,b",
            "eval.corpora=a,b: values with commas are a sweep, which needs -m; a list is eval.corpora=[a,b]",
        ),
        ("+seed=1", "+seed: this key exists; leave out the +."),
        ("~nonsense", "Could not delete from config. 'nonsense' does not exist."),
        ("mask_ratio=choice(1,2)", "Sweep parameters 'mask_ratio=choice(1,2)' requires --multirun."),
    ],
)
def test_what_cannot_be_composed(override: str, beginning: str) -> None:
    with initialize_config_dir(str(Path(CONF)), version_base="1.3"), pytest.raises(HydraException) as caught:
        compose("config", [override])
    sentence = sentence_of(caught.value)
    assert sentence.startswith(beginning) and "\n" not in sentence and sentence.endswith(".")
