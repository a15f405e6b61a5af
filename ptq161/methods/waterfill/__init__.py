"""Water-filling: channel bits allotted by energy, codes learned (this project's own; see ``docs/``)."""

from ptq161.methods.waterfill.allotment import allot, channel_energy
from ptq161.methods.waterfill.method import Waterfill

__all__ = ["Waterfill", "allot", "channel_energy"]
