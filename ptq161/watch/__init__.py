"""The command ``watch``: the state of every run in a folder, read from the records and shown in the terminal.

It imports ``sweep`` and ``tracking``; only the command line imports it.
"""
