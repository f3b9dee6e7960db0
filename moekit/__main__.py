"""``python -m moekit``: the console script ``moekit``."""

from moekit.recipes.cli import main

if __name__ == "__main__":
    main()
