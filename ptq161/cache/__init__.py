"""The cache of computed results: the store, a run's stages in it, whole results, and the command that prunes it.

These modules import ``tracking`` and the rooms below it; ``run`` and every room above may import them.
"""
