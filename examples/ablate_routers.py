"""Compare routers: train the same small model with each, on embedded data, and print one table."""

from moekit.recipes.ablation import main

if __name__ == "__main__":
    main()
