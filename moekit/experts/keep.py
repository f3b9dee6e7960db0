"""What a layer of kernels keeps between forward and backward, as a value that it takes as an argument."""

from typing import NamedTuple


class Keep(NamedTuple):
    """What lives from the forward to the backward, beside tokens, routing and parameters; the rest is computed again.

    Attributes:
        rows: the tokens copied to their rows, N D entries; else they are copied again.
        preactivation: the up-projections with their biases, N F entries each; else the backward computes them again,
            which adds a sixth of the arithmetic of forward and backward for MLP experts, and two ninths for gated ones.

    Example:
        >>> Keep(rows=False, preactivation=True) == PREACTIVATION  # what fused_layer takes unless told otherwise
        True
    """

    rows: bool
    preactivation: bool


EVERYTHING = Keep(rows=True, preactivation=True)
PREACTIVATION = Keep(rows=False, preactivation=True)
INPUTS = Keep(rows=False, preactivation=False)
