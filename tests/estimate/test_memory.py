"""What a quantization is predicted to hold, beside what torch says that it has allocated."""

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import ptq161
from ptq161.data.settings import CalibConfig
from ptq161.estimate.memory import quantization_memory, run_memory
from ptq161.estimate.shapes import ModelShape, shape_of
from ptq161.evaluation.settings import EvalConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda")
METHODS = {
    "rtn": ptq161.RTN(bits=2),
    "gptq": ptq161.GPTQ(bits=2),
    "omniquant": ptq161.OmniQuant(bits=2, epochs=1, batch_size=2),
    "ptq161": ptq161.PTQ161(epochs=1, batch_size=2),
    "ptq161_bfloat16": ptq161.PTQ161(epochs=1, batch_size=2, compute_dtype="bfloat16"),
    "waterfill": ptq161.Waterfill(level="linear", epochs=1, batch_size=2),
}


def model_of(hidden: int = 192, n_blocks: int = 1) -> LlamaForCausalLM:
    sizes = {"hidden_size": hidden, "intermediate_size": 11 * hidden // 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=n_blocks, vocab_size=64, **sizes)).eval()


def allocated(work: Callable[[], object]) -> int:
    """Return the most bytes of torch's CPU allocator that ``work`` held at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("name", METHODS)
def test_the_quantization_holds_what_is_predicted(name):
    method, model, shape = METHODS[name], model_of(), shape_of(model_of())
    n_samples, seq_len = 6, 32
    tokens = torch.randint(0, 64, (n_samples, seq_len), generator=torch.Generator().manual_seed(0))
    held = quantization_memory(shape, method, n_samples, seq_len, device=CPU)["quantize"].host
    predicted = held - 4 * shape.parameters  # the model was there before
    assert predicted == pytest.approx(allocated(lambda: ptq161.quantize(model, tokens, method)), rel=0.25)


def run(shape: ModelShape, method=METHODS["ptq161"], n_samples=8, device=CPU, **evaluation) -> float:
    settings = {"name": "quick", "corpora": ["boolq"], "seq_len": 64, "tasks": [], **evaluation}
    calib = CalibConfig("squad", n_samples, 64)
    phases = run_memory(shape, method, calib, EvalConfig(**settings), None, dtype=torch.bfloat16, device=device)
    return max(held.host + held.device for held in phases.values())


def test_more_of_anything_takes_more():
    shape = shape_of(model_of())
    assert run(shape) < run(shape_of(model_of(hidden=256)))
    assert run(shape) < run(shape_of(model_of(n_blocks=6)))
    shape, small = shape_of(model_of(n_blocks=2)), {"full_precision": False}
    assert run(shape, **small) < run(shape, n_samples=512, **small)
    assert run(shape, **small) < run(shape, method=ptq161.PTQ161(block_size=2, batch_size=2), **small)
    assert run(shape, seq_len=512, batch_size=1) < run(shape, seq_len=512, batch_size=16)


def test_on_a_gpu_the_model_is_in_host_memory_and_a_window_on_the_device():
    shape = shape_of(model_of(n_blocks=6))
    method = METHODS["gptq"]
    on_cpu, on_gpu = (quantization_memory(shape, method, 4, 32, device=device)["quantize"] for device in (CPU, GPU))
    assert on_cpu.device == 0
    assert on_gpu.host > 4 * shape.parameters
    assert on_gpu.host + on_gpu.device == on_cpu.host


def test_a_few_blocks_in_memory_take_the_same_whatever_their_number():
    peaks = [
        quantization_memory(shape_of(model_of(n_blocks=n)), METHODS["rtn"], 4, 32, device=CPU, whole_model=False)
        for n in (2, 6)
    ]
    assert peaks[0] == peaks[1]


def test_a_plan_keeps_the_inputs_of_every_block():
    phases = [
        quantization_memory(shape_of(model_of(n_blocks=n)), ptq161.Waterfill(), 16, 32, device=GPU)["plan"].host
        for n in (2, 6)
    ]
    weights = shape_of(model_of(n_blocks=6)).parameters - shape_of(model_of(n_blocks=2)).parameters
    assert phases[1] - phases[0] == 4 * weights + 4 * 4 * 16 * 32 * 192


def test_what_is_mapped_from_files_need_not_fit():
    shape = shape_of(model_of(n_blocks=6))
    calib, evaluation = CalibConfig("squad", 4, 32), EvalConfig(name="x", corpora=[], seq_len=32, tasks=[])
    for device in (CPU, GPU):
        phases = run_memory(shape, METHODS["gptq"], calib, evaluation, None, dtype=torch.float32, device=device)
        assert phases["load"].host == phases["load"].mapped == 4 * shape.parameters
        assert 0 < phases["quantize"].mapped <= 4 * shape.parameters
        assert phases["quantize"].host > phases["quantize"].mapped


def test_a_streamed_run_never_holds_the_model():
    shape = shape_of(model_of(n_blocks=4))
    settings = {"name": "quick", "corpora": ["boolq"], "seq_len": 64, "tasks": [], "full_precision": False}
    given = (shape, METHODS["ptq161"], CalibConfig("squad", 8, 64), EvalConfig(**settings), None)
    loaded, streamed = (run_memory(*given, dtype=torch.float32, device=CPU, stream=stream) for stream in (False, True))
    assert "load" in loaded and "load" not in streamed
    assert streamed["quantize"].host < loaded["quantize"].host - 2 * shape.linear_weights
