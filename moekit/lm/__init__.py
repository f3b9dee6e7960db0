"""What a language model needs around the MoE layer: the model, its data, its checkpoints."""
