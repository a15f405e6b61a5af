"""What a run will take, known before it is begun: bytes, memory and time.

Shapes, bytes and memory follow from the model's config and the run's settings alone; time rests on a benchmark of
seconds on this machine. The room imports ``run`` and the rooms below it; ``sweep``, which refuses a run that cannot
fit, imports it.
"""
