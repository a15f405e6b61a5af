"""Quantization methods, one module or package each, and the kinds of work that they share.

A method is a frozen dataclass of hyperparameters that implements :class:`ptq161.methods.base.Method`. Layer-wise ones
derive from ``layerwise``, those with error compensation from ``compensation``; block-wise ones train in ``blockwise``,
and learn codes in ``codes``. Beside its class, a module has the mathematics as functions of tensors. Methods import
``packed`` and what lies below it, never the driver; the driver and every room above may import them. Importing this
package imports no method.
"""

__all__ = [
    "awq",
    "base",
    "billm",
    "blockwise",
    "codes",
    "compensation",
    "fp4",
    "fp8",
    "gptq",
    "gse",
    "layerwise",
    "nf4",
    "omniquant",
    "pb_llm",
    "ptq161",
    "qdrop",
    "quant_dllm",
    "quip",
    "rtn",
    "vptq",
    "waterfill",
]
