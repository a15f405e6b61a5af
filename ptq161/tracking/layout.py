"""The layout of a run's record."""

SCHEMA_VERSION = 1
"""Version of the layout; every JSON file of a record has it."""
