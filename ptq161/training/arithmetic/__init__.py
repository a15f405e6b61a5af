"""The arithmetic in which a training multiplies matrices."""
