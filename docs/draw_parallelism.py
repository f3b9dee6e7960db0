"""Draw the pictures of docs/parallelism.md: ``python docs/draw_parallelism.py`` writes docs/images/parallel_*.png.

Nothing in them is placed by hand but the boxes: rows, drops and times come from moekit's own plans and formulas.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from drawings.exchanges import draw_all_to_all, draw_hierarchical, draw_static
from drawings.gathers import draw_all_gather, draw_experts_by_hidden, draw_tensor_parallel
from drawings.schedules import draw_chunked, draw_grids
from drawings.shapes import save
from matplotlib.figure import Figure

IMAGES = Path(__file__).parent / "images"
DRAWINGS: dict[str, Callable[[], Figure]] = {
    "grids": draw_grids,
    "all_to_all": draw_all_to_all,
    "static": draw_static,
    "hierarchical": draw_hierarchical,
    "all_gather": draw_all_gather,
    "tensor_parallel": draw_tensor_parallel,
    "experts_by_hidden": draw_experts_by_hidden,
    "chunked": draw_chunked,
}


def main(names: list[str]) -> None:
    """Draw some pictures, or all."""
    for name in names or DRAWINGS:
        path = save(DRAWINGS[name](), IMAGES / f"parallel_{name}.png")
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
