"""Quantization methods: one module or package each, all behind :class:`ptq161.methods.base.Method`."""
