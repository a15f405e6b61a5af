"""What was computed before, found again by its content: the store, the stages of a run in it, whole results.

Imports ``tracking/`` and what lies below it.
"""
