"""The training that preprocessing and finetuning share: the loop, its losses, its text and its checkpoints.

It imports ``driver`` and the rooms below it; ``preprocess``, ``finetune`` and every room above may import it.
"""
