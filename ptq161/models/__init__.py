"""Models: loading them from a folder, an asset or the hub, and the table of supported architectures.

They import ``data`` (the embedded model is one of its assets), ``files`` and the ground floor; ``packed`` and every
room above may import them.
"""

from ptq161.lazy import lazy_attributes

__getattr__ = lazy_attributes(
    __name__,
    {
        "ptq161.models.settings": ["PACKED_FORMAT", "ModelConfig"],
        "ptq161.models.architectures": [
            "ARCHITECTURES",
            "Architecture",
            "architecture_of",
            "decoder_blocks",
            "input_groups",
            "keep_first_blocks",
            "max_seq_len",
            "quantized_linears",
        ],
        "ptq161.models.checks": ["as_tokens", "check_model", "check_quantizable"],
        "ptq161.models.experts": ["fuse_experts", "split_experts"],
        "ptq161.models.loading": [
            "hub_commit",
            "is_packed_folder",
            "load_model",
            "load_tokenizer",
            "load_weights",
        ],
    },
)
