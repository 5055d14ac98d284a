"""Inverse frequencies: the angle of each pair from one position to the next. NumPy, float64.

A model extends its context by changing the frequencies that it was first trained with. There is a
function for each published rule, and `from_config` finds the rule and its numbers in a Hugging Face
config. Some rules also return an `attention_scaling`, by which cos and sin are multiplied. Models
of images and video rotate by several axes: see `axial` and `axial_from_config`.
"""

from .axial import AxialRotation, axial, axial_from_config
from .configs import (
    ALIASES,
    RULES,
    RotaryParameters,
    Rule,
    from_config,
    layer_types,
    pairs_neighbours,
    rotary_parameters,
)
from .models import MODEL_DEFAULTS
from .rules import (
    cos_sin,
    dynamic_ntk,
    inverse_frequencies,
    linear,
    llama3,
    longrope,
    ntk,
    partial_rotary_dim,
    proportional,
    xpos_scale,
    yarn,
)

__all__ = [
    "ALIASES",
    "MODEL_DEFAULTS",
    "RULES",
    "AxialRotation",
    "RotaryParameters",
    "Rule",
    "axial",
    "axial_from_config",
    "cos_sin",
    "dynamic_ntk",
    "from_config",
    "inverse_frequencies",
    "layer_types",
    "linear",
    "llama3",
    "longrope",
    "ntk",
    "pairs_neighbours",
    "partial_rotary_dim",
    "proportional",
    "rotary_parameters",
    "xpos_scale",
    "yarn",
]
