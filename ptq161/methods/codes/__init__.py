"""Learned codes: an engine that methods with codes on a grid share (this project's own).

``grid`` says where the values of a weight may lie and chooses codes with error compensation, ``latent`` is a linear
whose codes are learned, ``learn`` the learning itself, window by window.
"""

from ptq161.methods.codes.grid import CodeGrid, compensated_codes, fit_grid
from ptq161.methods.codes.latent import LatentLinear
from ptq161.methods.codes.learn import BETAS, CODES, Learning, damp
from ptq161.methods.codes.window import learn_window, start_all

__all__ = [
    "BETAS",
    "CODES",
    "CodeGrid",
    "LatentLinear",
    "Learning",
    "compensated_codes",
    "damp",
    "fit_grid",
    "learn_window",
    "start_all",
]
