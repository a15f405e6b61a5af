"""Water-filling: channel bits allotted by energy, codes learned (this project's own; see ``docs/``)."""

from ptq161.methods.waterfill.allotment import allot, channel_energy

__all__ = ["allot", "channel_energy"]
