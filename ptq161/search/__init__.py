"""The command ``search``: a search over settings with two objectives, whose result is their Pareto front.

It imports ``run``, ``tracking`` and the figures of ``report``; only the command line imports it. Each trial is a run in
a process of its own.
"""
