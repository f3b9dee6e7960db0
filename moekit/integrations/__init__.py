"""moekit inside other libraries. Each module imports its library where it is used: ``import moekit`` needs none."""
