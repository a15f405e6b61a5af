"""One run: its checked configuration, its identity, the pipeline and its stages, and the table that it prints.

These modules take Hydra's composed configuration but do not start Hydra. They import ``cache`` and the rooms below it;
``sweep`` and the commands above it may import them.
"""
