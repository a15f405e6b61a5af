"""Tables and figures from runs' records."""
