"""The kernels of expert layers, by what they multiply; nothing imports Triton before one of them is needed."""
