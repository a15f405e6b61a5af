"""The layout of a run's record."""

SCHEMA_VERSION = 1
"""Of the record's layout; every JSON file of a record carries it."""
