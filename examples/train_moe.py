"""Train and evaluate a Mixture-of-Experts language model; with no flags, a small one on embedded data."""

from moekit.recipes.train import main

if __name__ == "__main__":
    main()
