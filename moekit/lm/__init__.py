"""What a language model needs around its MoE layers: model, tokenizers, data, checkpoints, displays.

Import the submodules: those of the data need torchdata or tokenizers, those of the display rich, and the rest torch.
"""
