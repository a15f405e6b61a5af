"""Which linears of a model are trained, by their role in a decoder block."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from ptq161.errors import UserError
from ptq161.models.architectures import architecture_of, blocks_path, decoder_blocks, input_groups

ROLES: dict[str, tuple[str, ...]] = {
    "q": ("q_proj",),
    "k": ("k_proj",),
    "v": ("v_proj",),
    "o": ("o_proj", "out_proj"),
    "gate": ("gate_proj",),
    "up": ("up_proj", "fc1"),
    "down": ("down_proj", "fc2"),
}
"""Role of a linear in its decoder block -> its names in the architectures."""


def linears_of_roles(model: PreTrainedModel, roles: Sequence[str], setting: str) -> list[str]:
    """Return the module paths of the linears with one of some roles; a role that the architecture lacks is left out.

    Args:
        model: dense or packed.
        roles: keys of ``ROLES``.
        setting: that names them, for the error.

    Raises:
        UserError: the architecture has none of them.
    """
    ends = {end for role in roles for end in ROLES[role]}

    def is_target(path: str) -> bool:
        return path.rpartition(".")[2] in ends

    if not any(is_target(path) for group in architecture_of(model).linears for path in group):
        raise UserError(
            f"{setting}={list(roles)}: a {model.config.model_type} model has no such linear; "
            f"add one of {', '.join(role for role in ROLES if role not in roles)}."
        )
    home = blocks_path(model)
    return [
        f"{home}.{i}.{path}"
        for i, block in enumerate(decoder_blocks(model))
        for group in input_groups(model, block)
        for path in group
        if is_target(path)
    ]
