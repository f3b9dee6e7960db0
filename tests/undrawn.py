"""The training program without the picture at its end, which takes longer than a small run."""

import sys

from moekit.recipes import report
from moekit.recipes.train import main

if __name__ == "__main__":
    report.plot_run = lambda path, **options: path  # type: ignore[assignment]
    main(sys.argv[1:])
