"""``moekit bench layer``: whole MoE layers against the dense bound of the same run, with their stages, and peers."""
