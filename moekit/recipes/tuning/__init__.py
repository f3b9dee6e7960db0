"""``moekit tune``: which tiles are fastest for the products of a fused layer, on this device and these shapes."""
