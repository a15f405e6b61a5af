"""Many runs: the Hydra application, a sweep's jobs, their launcher and processes, failures and the summary.

These modules import ``run`` and the rooms below it; ``watch`` and the other commands above may import them. They
compute no number, so the hash of the sources leaves them out.
"""
