"""One run: its configuration, its identity, the pipeline, the table that it ends in.

The room of Hydra's composed configuration; imports ``cache/`` and everything below it.
"""
