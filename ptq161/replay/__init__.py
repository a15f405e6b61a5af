"""A recorded run, run again and compared."""
