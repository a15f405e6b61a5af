"""The bad inputs of ``bad_inputs.py``, as data.

``TINY`` stands for the arguments of a run on a tiny model and a text, ``EVALUATE`` for those of an evaluation. Paths
are relative to a new folder beside ``in/``, whose content ``bad_files.py`` makes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Case:
    """A bad input.

    Attributes:
        text: a command line that begins with ``ptq161``, or Python.
        sentence: matches the sentence that it gets; the words that tell what is wrong, since the rest may be said
            better one day.
        lines: of stderr at most.
    """

    text: str
    sentence: str
    lines: int = 1


CASES: list[Case] = []


def cases(*rows: tuple[str, str], prefix: str = "", lines: int = 1) -> None:
    """Add cases whose texts begin alike."""
    CASES.extend(Case(f"{prefix}{text}", sentence, lines) for text, sentence in rows)


# --- settings of a run ------------------------------------------------------------------------------------------------

cases(
    ("mask_ratio=1", r"mask_ratio=1.*\[0, 1\)"),
    ("mask_ratio=-0.1", r"mask_ratio=-0\.1.*\[0, 1\)"),
    ("mask_ratio=nan", "mask_ratio"),
    ("mask_ratio=much", "mask_ratio"),
    ("block_size=0", "block_size=0"),
    ("block_size=1.5", "block_size=1.5"),
    ("block_size=null", "block_size"),
    ("seed=-1", "seed=-1"),
    ("seed=zero", "seed"),
    ("dtype=int8", "dtype"),
    ("device=tpu", "device"),
    ("device=cuda:99", "device"),
    ("on_error=wait", "on_error"),
    ("cache=maybe", "cache"),
    ("force=true cache=false", "force"),
    ("method=rtn method.bits=0", "bits"),
    ("method=rtn method.bits=9", "bits"),
    ("method=rtn method.bits=two", "bits"),
    ("method=rtn method.group_size=0", "group_size"),
    ("method=rtn method.group_size=-1", "group_size"),
    ("method=rtn method.scale_dtype=int8", "scale_dtype"),
    ("method=gptq method.damping=-1", "damping"),
    ("method=rtn method.symmetric=perhaps", "symmetric"),
    ("method=awq method.auto_clip=1", "auto_clip"),
    ("method=quip method.rotation=none", "rotation"),
    ("method=omniquant method.epochs=-1", "epochs"),
    ("method=pb_llm method.low_frac=1.5", "low_frac"),
    ("method=pb_llm method.high_bit=7", "high_bit"),
    ("method=billm method.saliency=none", "saliency"),
    ("method.epochs=-1", "epochs"),
    ("method.epochs=2.5", "epochs"),
    ("method.batch_size=0", "batch_size"),
    ("method.salient_bits=7", "salient_bits"),
    ("method.compute_dtype=float8", "compute_dtype"),
    ("+method.nonsense=1", r"method\.nonsense"),
    ("+nonsense=1", "nonsense"),
    ("calib.n_samples=0", "n_samples"),
    ("calib.seq_len=0", "seq_len"),
    ("calib.seq_len=600", r"calib\.seq_len=600.*512"),
    ("calib.seq_len=long", "seq_len"),
    ("eval.seq_len=1", "seq_len"),
    ("eval.seq_len=600", r"eval\.seq_len=600.*512"),
    ("eval.max_windows=0", "max_windows"),
    ("eval.corpora=[nonsense]", "nonsense"),
    ("eval.corpora=wikitext2", "corpora"),
    ("eval.tasks=[nonsense]", "nonsense"),
    ("eval.limit=0", "limit"),
    ("eval.sample_tokens=-1", "sample_tokens"),
    ("preprocess=restorative_lora method=none", "preprocess"),
    ("preprocess=restorative_lora preprocess.steps=0", "steps"),
    ("preprocess=restorative_lora preprocess.lr=-1", "lr"),
    ("preprocess=restorative_lora preprocess.rank=0", "rank"),
    ("model.n_blocks=0", "n_blocks"),
    ("hydra.run.dir=../in/tiny.txt/run", "cannot be written"),
    prefix="ptq161 run TINY ",
)

# --- texts and models of a run ----------------------------------------------------------------------------------------

cases(
    ("calib.text_file=nowhere.txt", r"calib\.text_file=.*nowhere\.txt.*no such file"),
    ("calib.text_file=../in", r"calib\.text_file=.*/in"),
    ("calib.text_file=../in/short.txt", r"calib\.seq_len=64.*20"),
    ("calib.text_file=../in/empty.txt", "empty.txt|tokens"),
    ("calib.text_file=../in/no_text.txt", r"no_text\.txt"),
    ("calib.text_file=null", r"calib\.text_file"),
    ("eval.text_file=nowhere.txt", r"eval\.text_file=.*nowhere\.txt.*no such file"),
    ("eval.text_file=../in/short.txt", r"eval\.seq_len=64.*20"),
    ("eval.text_file=../in/no_text.txt", r"no_text\.txt"),
    ("eval.text_file=null", r"eval\.text_file"),
    ("model.path=nowhere", r"model\.path=.*nowhere.*config\.json"),
    ("model.path=../in/tiny.txt", r"config\.json"),
    ("model.path=../in/models/gpt2", "gpt2"),
    ("model.path=../in/models/gptq", "already quantized"),
    ("model.path=../in/models/nan", r"model\.layers\.1\.mlp\.up_proj\.weight"),
    ("model.path=../in/models/no_weights", "no_weights"),
    ("model.path=../in/models/cut_weights", "cut_weights"),
    ("model.path=../in/models/no_tokenizer", "tokenizer"),
    ("model.path=../in/models/cut_tokenizer", "tokenizer"),
    ("model.path=../in/models/cut_config", r"config\.json"),
    ("model.path=../in/models/list_config", r"config\.json"),
    ("model.path=../in/models/no_type", "no_type"),
    ("model.path=../in/models/lfs", "git-lfs"),
    ("model.path=../in/checkpoint method=rtn", "already quantized"),
    prefix="ptq161 run TINY ",
)

# transformers prints a report before the sentence.
cases(
    ("model.path=../in/models/other_sizes", r"mlp\.down_proj\.weight is missing from the weights or has another shape"),
    ("model.path=../in/models/lacks_a_tensor", r"model\.norm\.weight is missing from the weights"),
    prefix="ptq161 run TINY ",
    lines=20,
)

# --- the words of a command line --------------------------------------------------------------------------------------

cases(
    ("nonsense=1", "nonsense"),
    ("method=nonsense", "nonsense"),
    ("method.nonsense=1", "nonsense"),
    ("seed", "seed"),
    ("=1", "=1"),
    ("mask_ratio=", "mask_ratio"),
    ("model.path=~/tiny", "model.path='~/tiny'"),
    ("model.path=a=b", "model.path='a=b'"),
    ("'mask_ratio=(1'", "mask_ratio"),
    prefix="ptq161 run ",
)
cases(("hydra/launcher=nonsense seed=0,1", "nonsense"), prefix="ptq161 sweep TINY ")
cases(
    ("mask_ratio=0.1,1", r"mask_ratio=1"),
    ("seed=0,-1", "seed=-1"),
    ("model.path=nowhere,../in/tiny", "nowhere"),
    ("hydra.sweep.dir=../in/tiny.txt/sweep seed=0,1", "cannot be written"),
    prefix="ptq161 sweep TINY ",
)

# --- the commands that look on ----------------------------------------------------------------------------------------

cases(
    ("report nowhere --out out", "nowhere"),
    ("report ../in/run --out ../in/tiny.txt", "cannot be written"),
    ("report ../in/run --out out --metric nonsense", "nonsense"),
    ("report ../in/run --out out --x nonsense", "nonsense"),
    ("report ../in/run --out out --published nowhere.csv", r"nowhere\.csv"),
    ("report ../in/run --out out --published ../in/short.txt", r"short\.txt"),
    ("report ../in/run --out out --published ../in/no_text.txt", r"no_text\.txt"),
    ("replay nowhere", "nowhere"),
    ("replay ../in/tiny", "not a run directory"),
    ("replay ../in/runs/running", "did not finish"),
    ("replay ../in/runs/manifest_cut", r"manifest\.json"),
    ("replay ../in/runs/version", "schema_version"),
    ("replay ../in/runs/results_cut", "did not finish|damaged"),
    ("replay ../in/runs/config_cut", r"config\.yaml"),
    ("replay ../in/runs/metrics_cut", r"metrics\.jsonl"),
    ("replay ../in/runs/config_list", r"config\.yaml"),
    ("replay ../in/run --tolerance -1", "--tolerance"),
    ("replay ../in/run --tolerance little", "--tolerance"),
    ("replay ../in/run --tolerance nan", "--tolerance"),
    ("replay ../in/run --out ../in/run", "holds a record already"),
    ("watch nowhere", "nowhere"),
    ("watch ../in/tiny.txt", r"tiny\.txt"),
    ("watch ../in/run --every 0", "every"),
    ("cache --older-than 3", "--prune"),
    ("cache --unfinished", "--prune"),
    ("cache --prune --older-than soon", "older-than"),
    ("cache --prune --older-than -5", "older-than"),
    ("cache --kind nonsense --prune --yes", "yes"),
    ("generate nowhere text", "no packed checkpoint"),
    ("generate ../in/tiny text", "no packed checkpoint"),
    ("generate ../in/checkpoint ''", "the prompt is empty"),
    ("generate ../in/checkpoint text --max-new-tokens 0", "--max-new-tokens 0"),
    ("generate ../in/checkpoint text --max-new-tokens 9999", "--max-new-tokens 9999 are more than"),
    ("generate ../in/checkpoint text --temperature 0", "--temperature 0"),
    ("generate ../in/checkpoint text --threads 0", "--threads 0"),
    ("search --out out --trials 0", "--trials 0"),
    ("search --out out --seed -1", "--seed -1"),
    ("search --out out --space nowhere.yaml", r"nowhere\.yaml"),
    ("search --out out --space ../in/empty.txt", r"empty\.txt"),
    ("search --out out --space ../in/no_text.txt", r"no_text\.txt"),
    ("search --out out --space ../in/spaces/word.yaml", r"word\.yaml"),
    ("search --out out --space ../in/spaces/turned.yaml", r"turned\.yaml"),
    ("search --out out --objectives bits_per_weight bits_per_weight", "two different"),
    ("search --out out --objectives bits_per_weight nonsense", "nonsense"),
    ("search --out out seed=-1", "seed"),
    ("search --out ../in/tiny.txt", r"tiny\.txt"),
    prefix="ptq161 ",
)

# What is wrong with each record, or the verbs that there are, stand on lines of their own.
cases(
    ("report . --out out", "no finished run"),
    ("report ../in/tiny --out out", "no finished run"),
    ("report ../in/runs/results_cut --out out", "no finished run"),
    ("report ../in/runs/version --out out", "no finished run"),
    ("report", "required"),
    ("nonsense", "nonsense"),
    ("", "Usage"),
    prefix="ptq161 ",
    lines=12,
)

# --- checkpoints ------------------------------------------------------------------------------------------------------

DAMAGED = {
    "flipped": r"packed\.safetensors",
    "cut": r"packed\.safetensors",
    "no_weights": r"packed\.safetensors",
    "config_edited": r"config\.json",
    "tokenizer_cut": r"tokenizer\.json",
    "sums_empty": "SHA256SUMS",
    "sums_foreign": "SHA256SUMS",
    "without_sums_cut": r"packed\.safetensors",
    "layout": "layout 9",
    "format": "format",
    "lacks_a_tensor": "damaged",
}
cases(
    ('ptq161.load("nowhere")', "no packed checkpoint"),
    ('ptq161.load("../in/tiny")', "no packed checkpoint"),
    ('ptq161.load("../in/tiny.txt")', "no packed checkpoint"),
    ('ptq161.export("../in/tiny", "out")', "no packed checkpoint"),
    ('ptq161.export("../in/checkpoint", "../in/tiny")', r"tiny holds"),
    ('ptq161.export("../in/checkpoint", "../in/checkpoint")', r"checkpoint holds"),
    ('ptq161.export("../in/checkpoint", "../in/tiny", overwrite=True)', "did not write"),
    ('ptq161.export("../in/checkpoint", "../in/tiny.txt")', "is a file"),
    *[(f'ptq161.load("../in/checkpoints/{name}")', sentence) for name, sentence in DAMAGED.items()],
    *[(f'ptq161.export("../in/checkpoints/{name}", "out")', sentence) for name, sentence in DAMAGED.items()],
)
cases(
    *[(f"model.path=../in/checkpoints/{name}", sentence) for name, sentence in DAMAGED.items()],
    prefix="ptq161 run EVALUATE ",
)

# --- the library ------------------------------------------------------------------------------------------------------

cases(
    ("ptq161.save(model(), None, 'out')", "no packed linears"),
    ("ptq161.save(packed(), None, '../in/tiny')", "tiny holds"),
    ("ptq161.save(packed(), None, '../in/tiny.txt')", "is a file"),
    ("packed().save_pretrained('out', safe_serialization=False, max_shard_size='1KB')", "max_shard_size"),
    ("ptq161.quantize(packed(), tokens(), ptq161.RTN(bits=2))", "already quantized"),
    ("ptq161.quantize(torch.nn.Linear(2, 2), tokens(), ptq161.RTN(bits=2))", "Linear"),
    ("ptq161.quantize(model(), tokens()[:0], ptq161.RTN(bits=2))", "tokens"),
    ("ptq161.quantize(model(), tokens()[0], ptq161.RTN(bits=2))", "tokens"),
    ("ptq161.quantize(model(), tokens().float(), ptq161.RTN(bits=2))", "tokens"),
    ("ptq161.quantize(model(), tokens() + 256, ptq161.RTN(bits=2))", "256|vocabulary"),
    ("ptq161.quantize(model(), tokens() - 300, ptq161.RTN(bits=2))", "vocabulary|negative|-"),
    ("ptq161.quantize(model(), 'a text', ptq161.RTN(bits=2))", "tokens"),
    ("ptq161.quantize(model(), tokens(), ptq161.RTN(bits=2), salient_masks={})", "salient_masks"),
    ("ptq161.quantize(model(), tokens(), ptq161.PTQ161(epochs=0), salient_masks={})", "salient_masks"),
    ("ptq161.quantize(model(), tokens(), ptq161.RTN(bits=2), resume='../in/tiny')", r"no fingerprint\.json"),
    ("ptq161.quantize(model(), tokens(), ptq161.RTN(bits=2), resume='../in/tiny.txt')", "cannot be written"),
    ("ptq161.RTN(bits=5)", "bits"),
    ("ptq161.RTN(bits=0)", "bits"),
    ("ptq161.RTN(bits='2')", "bits"),
    ("ptq161.RTN(bits=2, group_size=0)", "group_size"),
    ("ptq161.RTN(bits=2, scale_dtype='int8')", "scale_dtype"),
    ("ptq161.GPTQ(bits=2, damping=-1.0)", "damping"),
    ("ptq161.GPTQ(bits=2, batch_size=0)", "batch_size"),
    ("ptq161.AWQ(bits=16)", "bits"),
    ("ptq161.QuIP(bits=5)", "bits"),
    ("ptq161.QuIP(rotation='none')", "rotation"),
    ("ptq161.OmniQuant(bits=2, epochs=-1)", "epochs"),
    ("ptq161.PBLLM(low_frac=-0.1)", "low_frac"),
    ("ptq161.PBLLM(high_bit=7)", "high_bit"),
    ("ptq161.BiLLM(saliency='none')", "saliency"),
    ("ptq161.PTQ161(mask_ratio=1.0)", "mask_ratio"),
    ("ptq161.PTQ161(epochs=-1)", "epochs"),
    ("ptq161.PTQ161(block_size=0)", "block_size"),
    ("ptq161.PTQ161(salient_bits=7)", "salient_bits"),
    ("ptq161.PTQ161(compute_dtype='int8')", "compute_dtype"),
)
EVALUATION = (
    "eval=ppl eval.corpora=[text_file] eval.text_file=../in/tiny.txt eval.seq_len=64 eval.max_windows=2 "
    "tracker=none device=cpu"
)
CASES[:] = [dataclasses.replace(case, text=case.text.replace(" EVALUATE ", f" {EVALUATION} ")) for case in CASES]


def names_for_calls(inputs: Path) -> dict[str, Any]:
    """Return what the calls of the library use."""
    import torch
    from transformers import AutoModelForCausalLM

    import ptq161

    def tokens() -> torch.Tensor:
        return torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(0))

    return {
        "ptq161": ptq161,
        "torch": torch,
        "model": lambda: AutoModelForCausalLM.from_pretrained(inputs / "tiny"),
        "packed": lambda: ptq161.load(inputs / "checkpoint")[0],
        "tokens": tokens,
    }
