"""Settings as they are typed: checked before Hydra reads them, and one sentence for whatever Hydra rejects.

Hydra's own messages are several lines that name its grammar's rules and not what helps.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

# Internal, but the only parser that knows which arguments of the command line are settings and which are Hydra's own.
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, RangeSweep
from hydra.errors import CompactHydraException, HydraException, InstantiationException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from ptq161.errors import UserError
from ptq161.files.paths import absolute_path

_FOLDERS = ("hydra.run.dir", "hydra.sweep.dir")
_HELP = "python run.py --help explains every key"
_PLAIN = re.compile(r"[A-Za-z_./][\w./-]*", re.ASCII)
"""Strings that mean themselves without quotes."""
_WORDS = ("null", "true", "false", "nan", "inf")
_CALL_OR_BRACKET = re.compile(r"[\[{]|(choice|range|interval|glob|sort|shuffle|tag|int|float|str|bool|extend_list)\(")


def check_arguments(arguments: Sequence[str]) -> list[str]:
    """Check the settings among the arguments of the command line, and expand ``~`` in the folders of records.

    In a sweep over a group, such as ``method=rtn,gptq method.bits=3``, Hydra composes the group's default with all that
    is not swept, and may not find its keys there. So a key of a swept group is given as a sweep of one value
    (all but null, which Hydra cannot sweep: ``++method.group_size=null``).

    Args:
        arguments: settings and Hydra's own flags, in any order.

    Returns:
        the arguments for Hydra.

    Raises:
        UserError: a setting is not ``KEY=VALUE``, or its value must be quoted.
    """
    flags = get_args_parser().parse_args(arguments)
    if flags.shell_completion:  # begun settings
        return list(arguments)
    settings = {argument: _parsed(argument, flags.multirun) for argument in flags.overrides}
    sweeps = [setting for setting in settings.values() if flags.multirun and setting.is_sweep_override()]
    swept = {str(setting.key_or_group) for setting in sweeps}
    return [
        _expanded(settings[argument], _of_each_job(settings[argument], argument, swept))
        if argument in settings
        else argument
        for argument in arguments
    ]


def as_value(value: Any) -> str:
    """Return a plain value in the grammar of Hydra's overrides."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    if not isinstance(value, str) or (_PLAIN.fullmatch(text) and text.lower() not in _WORDS):
        return text
    # Inside quotes, backslashes before a quote or at the end are escapes in Hydra's grammar.
    escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), text)
    return f"'{escaped}'"


def exact_range(setting: str) -> str:
    """Return a swept range of floats as the values that were meant; any other setting as it is.

    Hydra adds the step again and again in binary, which makes 0.30000000000000004 of ``range(0.1,0.4,0.1)``, or one
    value too many of ``range(0,0.9,0.3)``.

    Raises:
        UserError: the range has no values.
    """
    parsed = OverridesParser.create().parse_override(setting)
    swept = parsed.value()
    if not isinstance(swept, RangeSweep):
        return setting
    start, stop, step = _fractions(swept)
    count = max(0, math.ceil((stop - start) / step)) if step else 0
    if not count:
        raise UserError(f"{setting}: the range has no values; use range(START,STOP,STEP), which leaves out STOP.")
    if all(isinstance(number, int) for number in (swept.start, swept.stop, swept.step)):
        return setting
    values = ",".join(str(float(start + number * step)) for number in range(count))
    key = setting.partition("=")[0]
    return f"{key}=shuffle({values})" if swept.shuffle else f"{key}={values}"


def sentence_of(error: Exception) -> str:
    """Return what a user is told of an error of the configuration: one sentence that says what would be right."""
    text = str(error)
    if isinstance(error, UserError):
        return text
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={option}: there is no such option; use one of {', '.join(error.options)}."
    if ambiguous := re.match(r"Ambiguous value for argument '(.*)'$", text, re.MULTILINE):
        key, _, value = ambiguous[1].partition("=")
        return (
            f"{ambiguous[1]}: values with commas are a sweep, which needs -m; "
            f"a list is {key}=[{value}], and one value is {_typed(key, as_value(value))}."
        )
    if existing := re.match(r"Could not append to config\. An item is already at '(.*)'\.$", text, re.MULTILINE):
        return f"+{existing[1]}: this key exists; leave out the +."
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(error, InstantiationException) and isinstance(cause, UserError | CompactHydraException):
        return sentence_of(cause)
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and isinstance(cause.parent_node, DictConfig):
        known = ", ".join(sorted(str(key) for key in cause.parent_node if key not in ("hydra", "_target_")))
        return f"unknown key {cause.full_key}: known are {known}; {_HELP}."
    more = f". {cause}" if isinstance(cause, OmegaConfBaseException) and cause is not error else ""
    words = " ".join(f"{text}{more}".split())
    return words if words.endswith(".") else f"{words}."


def _parsed(setting: str, sweeping: bool) -> Override:
    key, equals, value = setting.partition("=")
    parser = OverridesParser.create()
    try:
        if not key:
            raise HydraException("no key")
        return parser.parse_override(setting)
    except HydraException as error:
        if not key or not equals or not _reads(f"{key}=0"):
            raise UserError(f"{setting!r} is no setting: use KEY=VALUE; {_HELP}.") from error
        if value[:1] in ("'", '"'):
            raise UserError(f"{setting} cannot be read: close its quotes, as in \"{key}='VALUE'\".") from error
        quoted = ",".join(map(as_value, value.split(","))) if sweeping else as_value(value)
        if _CALL_OR_BRACKET.match(value) or not _reads(f"{key}={quoted}"):
            raise UserError(
                f"{setting} cannot be read: close its brackets, and put single quotes around text with special "
                "characters inside them."
            ) from error
        raise UserError(f"{setting} cannot be read: quote the value, {_typed(key, quoted)}.") from error


def _of_each_job(setting: Override, argument: str, swept: set[str]) -> str:
    key, _, value = argument.partition("=")
    of_swept_group = any(key.startswith(f"{group}.") for group in swept)
    if not of_swept_group or setting.is_sweep_override() or setting.type != OverrideType.CHANGE:
        return argument
    chosen = f"{key}=choice({value})"
    return chosen if _reads(chosen) else argument


def _reads(setting: str) -> bool:
    try:
        OverridesParser.create().parse_override(setting)
    except HydraException:
        return False
    return True


def _typed(key: str, quoted: str) -> str:
    """Return a setting with quotes for the shell around it, which takes away a pair of them."""
    setting = f"{key}={quoted}"
    return shlex.quote(setting) if re.search(r'["$`\\!]', setting) else f'"{setting}"'


def _expanded(setting: Override, argument: str) -> str:
    key, value = setting.key_or_group, setting.value()
    if key not in _FOLDERS or not str(value).startswith("~"):
        return argument
    return f"{key}={as_value(str(absolute_path(key, str(value))))}"


def _fractions(swept: RangeSweep) -> list[Fraction]:
    """Return start, stop and step as the short decimals that they are within 1e-12."""
    numbers = [float(swept.start or 0), float(swept.stop or 0), float(swept.step)]
    # What is left of a difference that should be 0, as in sort(range(...), reverse=true).
    least = 1e-12 * max(map(abs, numbers))
    return [Fraction(f"{number:.12g}") if abs(number) > least else Fraction(0) for number in numbers]
