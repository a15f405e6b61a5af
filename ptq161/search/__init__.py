"""A search over settings with two objectives, whose result is their Pareto front."""
