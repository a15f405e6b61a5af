"""The layout of a run's record."""

SCHEMA_VERSION = 1
"""Version of the layout; every JSON file of a record has it."""

RECORD_FILES = ("config.yaml", "manifest.json", "metrics.jsonl", "results.json", "samples.jsonl")
"""The files of a record that are read back; ``SHA256SUMS`` has their checksums once the run has ended."""
