"""Post-training quantization of language models below 2 bits per weight: run, compare and reproduce experiments.

The library in four verbs, with a class of hyperparameters for each method::

    model = ptq161.quantize(model, tokens, ptq161.PTQ161(mask_ratio=0.2))
    ptq161.save(model, tokenizer, "checkpoint")
    model, tokenizer = ptq161.load("checkpoint")
    ptq161.export("checkpoint", "dense_model")

and, for a model that is larger than the memory, the first two in one::

    ptq161.quantize_folder("model", tokens, ptq161.PTQ161(mask_ratio=0.2), "checkpoint")

The rooms of the package, from the verbs down to the ground floor; each imports from those below it (the layers in
``pyproject.toml``)::

    search replay report watch      the commands that start runs or show their records,
    generate                        and the one that generates text
    sweep                           many runs
    estimate                        what a run will take
    run                             one run: configuration, pipeline
    cache                           results that were computed before
    tracking                        the record of a run and its mirror
    preprocess finetune evaluation  training before and after the quantization; perplexity, zero-shot tasks
    training                        the training loop, its losses, its text
    console                         the console that the commands print with
    driver                          a method applied to a model, window by window; the library ends here
    methods                         the quantization methods
    packed                          storage formats of the weights, packed linears, checkpoints
    models                          loading, architectures
    data                            text, calibration tokens, corpora
    kernels files                   arithmetic; bytes on disk
    numerics checks seeding         the ground floor: device and dtype, checks of settings, random numbers,
    lazy errors                     imports on first use, the exception for users
"""

from typing import TYPE_CHECKING

from ptq161.errors import UserError
from ptq161.lazy import import_after, lazy_attributes

if TYPE_CHECKING:
    from ptq161.driver.folders import quantize_folder
    from ptq161.driver.quantization import quantize
    from ptq161.methods.awq import AWQ
    from ptq161.methods.billm import BiLLM
    from ptq161.methods.embeddings import quantize_embeddings
    from ptq161.methods.fp4 import FP4
    from ptq161.methods.fp8 import FP8
    from ptq161.methods.gptq import GPTQ
    from ptq161.methods.gse import GSE
    from ptq161.methods.nf4 import NF4
    from ptq161.methods.omniquant import OmniQuant
    from ptq161.methods.pb_llm import PBLLM
    from ptq161.methods.ptq161 import PTQ161
    from ptq161.methods.qdrop import QDrop
    from ptq161.methods.quant_dllm import QuantDLLM
    from ptq161.methods.quip import QuIP
    from ptq161.methods.rtn import RTN
    from ptq161.methods.vptq import VPTQ
    from ptq161.methods.waterfill import Waterfill
    from ptq161.packed.checkpoint import load, save
    from ptq161.packed.export import export

__all__ = [
    "AWQ",
    "FP4",
    "FP8",
    "GPTQ",
    "GSE",
    "NF4",
    "PBLLM",
    "PTQ161",
    "RTN",
    "VPTQ",
    "BiLLM",
    "OmniQuant",
    "QDrop",
    "QuIP",
    "QuantDLLM",
    "UserError",
    "Waterfill",
    "export",
    "load",
    "quantize",
    "quantize_embeddings",
    "quantize_folder",
    "save",
]
__version__ = "0.2.0"

# transformers takes seconds to import; an error in a setting must not wait for it.
__getattr__ = lazy_attributes(
    __name__,
    {
        "ptq161.driver.folders": ["quantize_folder"],
        "ptq161.driver.quantization": ["quantize"],
        "ptq161.packed.checkpoint": ["load", "save"],
        "ptq161.packed.export": ["export"],
        "ptq161.methods.awq": ["AWQ"],
        "ptq161.methods.billm": ["BiLLM"],
        "ptq161.methods.embeddings": ["quantize_embeddings"],
        "ptq161.methods.fp4": ["FP4"],
        "ptq161.methods.fp8": ["FP8"],
        "ptq161.methods.gptq": ["GPTQ"],
        "ptq161.methods.gse": ["GSE"],
        "ptq161.methods.nf4": ["NF4"],
        "ptq161.methods.omniquant": ["OmniQuant"],
        "ptq161.methods.pb_llm": ["PBLLM"],
        "ptq161.methods.ptq161": ["PTQ161"],
        "ptq161.methods.qdrop": ["QDrop"],
        "ptq161.methods.quant_dllm": ["QuantDLLM"],
        "ptq161.methods.quip": ["QuIP"],
        "ptq161.methods.rtn": ["RTN"],
        "ptq161.methods.vptq": ["VPTQ"],
        "ptq161.methods.waterfill": ["Waterfill"],
    },
)

# from_pretrained of transformers opens a packed checkpoint after this.
import_after("transformers.quantizers.auto", "ptq161.packed.pretrained")
# LoRA of PEFT takes packed linears after this.
import_after("peft.tuners.lora.model", "ptq161.packed.lora")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
