"""The driver under its earlier name."""

from ptq161.driver.capture import BlockArguments, capture_inputs
from ptq161.driver.quantization import quantize

__all__ = ["BlockArguments", "capture_inputs", "quantize"]
