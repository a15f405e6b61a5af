"""The driver: a model's decoder blocks, window by window, through a method; resumable.

The library ends here: nothing at or below this room knows Hydra, W&B or lm-eval.
"""
