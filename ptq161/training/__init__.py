"""The training of a whole model: the loop, its losses, its text and its checkpoints.

It imports ``driver`` and the rooms below it; ``preprocess`` and every room above may import it.
"""
