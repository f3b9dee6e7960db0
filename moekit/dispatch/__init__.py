"""Dispatch: a routing to a plan, and tokens to grouped rows and back."""

from moekit.dispatch.dispatchers import dropless, padded
from moekit.dispatch.plans import (
    by_choice,
    by_position,
    by_weight,
    capacity,
    dropless_plan,
    padded_plan,
    without_dropped,
)
from moekit.dispatch.rows import gather_rows, gather_rows_by_index, scatter_rows, scatter_rows_by_index
from moekit.dispatch.soft import mix_tokens, slot_routing, spread_slots
from moekit.dispatch.weighing import weigh_inputs

__all__ = [
    "dropless",
    "padded",
    "dropless_plan",
    "padded_plan",
    "capacity",
    "without_dropped",
    "by_position",
    "by_choice",
    "by_weight",
    "gather_rows",
    "scatter_rows",
    "gather_rows_by_index",
    "scatter_rows_by_index",
    "weigh_inputs",
    "mix_tokens",
    "spread_slots",
    "slot_routing",
]
