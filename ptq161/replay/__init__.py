"""The command ``replay``: a recorded run is run again and compared with its record.

It imports ``run``, ``tracking`` and the rooms below them; only the command line imports it.
"""
