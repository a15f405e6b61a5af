"""The arithmetics by name, and the check of their settings."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ptq161.checks import check_choice
from ptq161.packed.gse import check_gse
from ptq161.training.arithmetic import gse, metis
from ptq161.training.arithmetic.base import Arithmetic, ArithmeticSettings

FLOAT = "float"
"""The arithmetic in which nothing is quantized."""

ARITHMETICS: dict[str, Callable[[ArithmeticSettings, Tensor], Arithmetic]] = {
    "gse": gse.arithmetic,
    **dict.fromkeys(metis.NAMES, metis.arithmetic),
}
"""Name -> builder from the settings and the weight ``[out, in]`` that it serves, for all that quantize."""

NAMES = (FLOAT, *ARITHMETICS)
"""Values of the setting ``arithmetic``."""


def arithmetic_of(settings: ArithmeticSettings, weight: Tensor) -> Arithmetic:
    """Return the arithmetic that settings name, for the products with one weight ``[out, in]``."""
    return Arithmetic() if settings.arithmetic == FLOAT else ARITHMETICS[settings.arithmetic](settings, weight)


def check_arithmetic(group: str, settings: ArithmeticSettings) -> None:
    """Check the settings of an arithmetic.

    Args:
        group: the configuration group, for the error.
        settings: of a training.

    Raises:
        UserError: the name is not known, or a value is out of range.
    """
    check_choice(f"{group}.arithmetic", settings.arithmetic, NAMES)
    check_gse(group, settings.bits, settings.group_size)
    metis.check_metis(group, settings)
