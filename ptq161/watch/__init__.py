"""Follow a sweep, or a run, in the terminal."""
