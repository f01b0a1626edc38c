"""What only an NVIDIA card can show. `python -m pytest -m gpu -s` takes some minutes and writes gpu.json.

Without a card every test is skipped. TOOL_R1_GPU_TESTS=cpu runs them on the CPU at a small size: that shows that the
tests themselves work, and nothing about a GPU.
"""
import json
import os
import time
from pathlib import Path

import bitsandbytes
import pytest
import torch
import transformers
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo import GRPOConfig, make_optimizer, update
from machinery.checkpoint import pack_optimizer, unpack_optimizer
from machinery.engine import attend
from machinery.fast_layers import fast_layers
from machinery import preflight
from machinery.head import exact_logits
from machinery.memory import memory
from naive_update import random_batch
from policy import Policy, Preset, load_policy, model_config, never_repack
from scripted import Workload
from scripts import bench
from scripts.bench import SMALL, largest_logp_difference, run_engine
from test_grpo import Keep

ON_CPU = os.environ.get("TOOL_R1_GPU_TESTS") == "cpu"
DEVICE = "cpu" if ON_CPU else "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(
    not (ON_CPU or torch.cuda.is_available()), reason="needs an NVIDIA card: torch finds none")]
FIGURES = {}


@pytest.fixture(scope="module", autouse=True)
def record():
    """gpu.json: the card, the versions, the figures. A larger card is read as one of 24 GB, an RTX 4090."""
    if not ON_CPU:
        torch.backends.cuda.enable_cudnn_sdp(False)         # as load_policy does
        gib = torch.cuda.mem_get_info()[1] / 2**30
        if gib > 26:
            torch.cuda.set_per_process_memory_fraction(22.7 / gib)
            bitsandbytes.backends.cuda.ops._gpu_dispatch_props = lambda device: (128, 8, 9)     # its kernels
            FIGURES["read as"] = "RTX 4090"
    yield
    card = "none (CPU)" if ON_CPU else torch.cuda.get_device_name()
    versions = {package.__name__: package.__version__ for package in (torch, transformers, bitsandbytes)}
    figures = {"card": card, "versions": versions, "figures": FIGURES}
    if not ON_CPU:
        Path("gpu.json").write_text(json.dumps(figures, indent=1))
    print("\n" + json.dumps(figures, indent=1))


def seven_billion(layers: int):
    """Random weights at the widths of Qwen2.5-7B, NF4 and LoRA, with few layers; on the CPU the small shape."""
    config = model_config("Qwen2.5-0.5B" if ON_CPU else "Qwen2.5-7B")
    config.num_hidden_layers = layers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "model_config", lambda name: config)
        network = bench.random_model("fewer layers", DEVICE)
    never_repack(network)
    return network


def as_policy(network):
    return Policy(network, None, network.device, "random weights", Preset())


def stir(network):
    with torch.no_grad():
        for p in network.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.02)


def test_the_check_before_a_download_finds_card_driver_and_kernel():
    lines = [preflight.card(not ON_CPU, 7.6e9), preflight.driver(not ON_CPU), preflight.nf4_kernel("nf4", 7.6e9)]
    FIGURES["check"] = {line.what: line.found for line in lines}
    assert [line.state for line in lines] == ["ok"] * 3


def test_the_layout_of_masked_attention_is_reshaped():
    """Which kernel runs, and that its output survives `attend`: consumer cards return (1, M, H, D) transposed."""
    q = torch.randn(1, 2, 64, 64, device=DEVICE, dtype=torch.bfloat16)
    mask = torch.zeros(1, 1, 64, 64, device=DEVICE, dtype=torch.bfloat16)
    out = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    FIGURES["masked attention strides"] = list(out.stride())
    assert out.reshape(4, 32, 64).shape == (4, 32, 64) and callable(attend)


def test_the_built_in_model_computes_in_fp32():
    """Rounding hurts a small model, and fp32 costs it nothing."""
    policy = load_policy("tiny")
    assert policy.model.dtype == torch.float32 and policy.device.type == DEVICE


@pytest.mark.parametrize("rows", [1, 4, 8, 34, 64, 546])
def test_nf4_products_agree_with_dequantised_weights(rows):
    linear = bitsandbytes.nn.Linear4bit(256, 512, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to(DEVICE)
    x = torch.randn(rows, 256, device=DEVICE, dtype=torch.bfloat16)
    weight = bitsandbytes.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state).to(torch.bfloat16)
    with torch.no_grad():
        error = (linear(x) - x @ weight.reshape(512, 256).T).abs().max().item()
    FIGURES[f"nf4 error at {rows} rows"] = error
    assert error < 0.05


@pytest.mark.skipif(ON_CPU, reason="the product of bf16 with an fp32 result is a GPU's")
def test_bf16_logits_are_not_rounded():
    """At 16 to 32 a logit in bf16 is off by up to 0.06."""
    hidden = torch.randn(64, 3584, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(4096, 3584, device=DEVICE, dtype=torch.bfloat16) / 8
    exact = hidden.double() @ weight.double().T
    ways = (exact_logits(hidden, weight), hidden @ weight.T)
    errors = [(logits.double() - exact).abs().max().item() for logits in ways]
    FIGURES["error of logits in fp32, in bf16"] = errors
    assert errors[0] < 0.01 < errors[1]


def test_the_8_bit_optimiser_steps_packs_and_goes_on():
    network = seven_billion(1)
    stir(network)
    one = make_optimizer(as_policy(network), 1e-3)
    parameters = [p for p in network.parameters() if p.requires_grad]

    def step(optimizer):
        for p in parameters:
            p.grad = torch.sin(1000 * p.detach())
        optimizer.step()
    step(one)
    tensors, scalars = pack_optimizer(one)
    kept = [p.detach().clone() for p in parameters]
    step(one)
    expected = [p.detach().clone() for p in parameters]
    two = make_optimizer(as_policy(network), 1e-3)
    unpack_optimizer(two, tensors, scalars)
    for p, before in zip(parameters, kept):
        p.data.copy_(before)
    step(two)
    assert all(torch.equal(p, e) for p, e in zip(parameters, expected))


def test_a_small_model_computes_on_the_gpu_what_it_computes_on_the_cpu():
    work = Workload(groups=2, turns=2, sampled=(5, 30), observed=(5, 60), prompt=600, context=1024)
    outs = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(**SMALL.to_dict())).eval().to(device)
        run = run_engine(model, work, 8)
        outs.append({tuple(episode.seed): ids for episode, ids, *_ in run["out"]})
        FIGURES[f"fp32 log-prob difference, {device}"] = largest_logp_difference(model, run["out"])
        assert FIGURES[f"fp32 log-prob difference, {device}"] < 1e-3
    same = sum(outs[0][key] == outs[1][key] for key in outs[0])
    FIGURES["trajectories with the CPU's tokens"] = f"{same} of {len(outs[0])}"
    assert same >= 0.8 * len(outs[0])           # a rounding may turn a draw at the edge of two tokens


def test_sampler_and_scorer_agree_in_nf4_and_bf16():
    network = seven_billion(2 if ON_CPU else 4)
    stir(network)
    work = Workload(groups=1, turns=2, sampled=(5, 20), observed=(5, 60), prompt=80 if ON_CPU else 600, context=1024)
    run = run_engine(network, work, 8)
    FIGURES["nf4, bf16: largest log-prob difference"] = largest_logp_difference(network, run["out"])
    assert FIGURES["nf4, bf16: largest log-prob difference"] < 0.5


def test_the_tree_update_equals_the_padded_one_up_to_rounding():
    network = seven_billion(2)
    stir(network)
    policy = as_policy(network)
    batch = random_batch(network.config.vocab_size, [40, 60, 60, 90])
    grads = []
    for plain in (True, False):
        optimizer = Keep(policy.trainable(), lr=0.0)
        update(policy, optimizer, batch, GRPOConfig(beta=0.01), plain=plain)
        grads.append(torch.cat([g.flatten() for g in optimizer.seen[0]]))
    cosine = torch.cosine_similarity(*grads, dim=0).item()
    FIGURES["tree against padded gradient, cosine"] = cosine
    assert cosine > 0.99


def test_the_peak_is_that_of_the_plan():
    if ON_CPU:
        pytest.skip("the CPU has no peak of allocated memory")
    tokens, slots = 4096, 8
    network = seven_billion(28)
    network.activation_checkpointing_enable({"use_reentrant": False})
    policy = as_policy(network)
    optimizer = make_optimizer(policy, 1e-5)
    batch = random_batch(network.config.vocab_size, [tokens] * 2)
    plan = memory(network.config, True, slots, tokens, tokens)
    del plan["runtime: CUDA context, fragmentation"]
    for column, phase in enumerate(("sampling", "update")):
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        if phase == "sampling":
            run_engine(network, Workload(1, 1, (32, 32), (1, 1), tokens - 64, tokens), slots)
        else:
            update(policy, optimizer, batch, GRPOConfig(token_budget=tokens))
        peak, planned = torch.cuda.max_memory_allocated() / 2**30, sum(part[column] for part in plan.values())
        FIGURES[f"7B, {phase}, {tokens} tokens"] = {
            "seconds": time.perf_counter() - began, "peak GiB": peak, "planned GiB": planned}
        assert peak < 1.15 * planned


def test_a_decoded_token_takes_less_with_fast_layers():
    network = seven_billion(2 if ON_CPU else 28)
    ids = torch.zeros(1, 8, dtype=torch.long, device=DEVICE)

    def milliseconds():
        if not ON_CPU:
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(10):
            network(input_ids=ids, use_cache=False)
        if not ON_CPU:
            torch.cuda.synchronize()
        return 100 * (time.perf_counter() - began)
    with torch.no_grad():
        milliseconds()
        FIGURES["forward of 8 tokens, PEFT's layers, ms"] = milliseconds()
        with fast_layers(network):
            milliseconds()
            FIGURES["forward of 8 tokens, fast layers, ms"] = milliseconds()
    assert FIGURES["forward of 8 tokens, fast layers, ms"] < 1.2 * FIGURES["forward of 8 tokens, PEFT's layers, ms"]
