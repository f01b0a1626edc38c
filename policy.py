"""The policy: a frozen language model with a LoRA adapter on it, and everything that depends on its size.

Owns: turning a name into a model (`resolve_model`, `load_policy`), the frozen base in NF4 or not, the adapter and
the file format it is saved in, the reference policy (the same network, adapter off), the defaults per model size
(`Preset`) and the memory plan for `--vram`.  Knows nothing of tasks, rewards or losses.

Reading order: Preset -> resolve_model -> load_policy -> Policy -> save_adapter -> plan_memory.

QLoRA (Dettmers et al. 2023, arXiv 2305.14314) as built here:
* base weights NF4 with double quantisation, frozen; embeddings, norms and head stay in bf16.  PEFT's
  `prepare_model_for_kbit_training` is *not* used: it would copy embedding and head to fp32, +2 GiB at 7B.
* adapter weights in fp32 on all linear layers but the head, dropout 0, so that the sampler and the scorer see
  the same network whatever mode it is in.
* the adapter is never merged: merging into 4-bit weights rounds it away.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import requests
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from tools import UserError

TINY_DIR = Path(__file__).resolve().parent / "tiny"  # the built-in model, made by tiny.py


# ------------------------------------------------------------------------------------------------ defaults per size


@dataclass(frozen=True)
class Preset:
    """Defaults that depend on the size of the model; train.py's flags override them one by one."""

    prompt: str = "full"  # "short": one fixed line, as the built-in model was warm-started; "full": tools documented
    max_turns: int = 6
    turn_tokens: int = 1024  # sampled tokens a turn
    context_tokens: int = 8192  # prompt + everything sampled and observed
    observation_tokens: int = 2000  # an observation is cut in the middle to this
    groups: int = 8  # tasks a step
    group_size: int = 8  # trajectories a task: G
    steps: int = 200
    lr: float = 1e-5
    warmup: int = 8  # steps of linear warm-up
    schedule: str = "constant"  # after the warm-up: "constant", or "cosine" down to 0 at the last step
    beta: float = 1e-3  # weight of the KL penalty; 0 skips the reference pass
    minibatches: int = 1  # optimiser steps a batch
    token_budget: int = 8192  # padded tokens a micro-batch


TINY = Preset(
    prompt="short", max_turns=4, turn_tokens=96, context_tokens=512, observation_tokens=64, groups=12, steps=50,
    lr=1e-3, schedule="cosine", beta=0.0, minibatches=3,
)  # fmt: skip


def preset_for(parameters: int) -> Preset:
    """The preset for a model of that many parameters.  Smaller models bear a larger learning rate."""
    if parameters < 50e6:
        return TINY
    lr = 5e-5 if parameters < 1e9 else 2e-5 if parameters < 5e9 else 1e-5
    return Preset(lr=lr)


def head_size(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def linear_shapes(config) -> list[tuple[int, int]]:
    """(in, out) of the seven linear layers of one decoder block of a Llama-shaped model (Qwen2, Qwen3, Llama...)."""
    h, i = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * head_size(config), config.num_key_value_heads * head_size(config)
    return [(h, q), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h)]


def parameter_counts(config) -> tuple[int, int]:
    """(parameters in the blocks' linear layers, in embedding and head); norms and biases are below 0.01 %."""
    linear = config.num_hidden_layers * sum(a * b for a, b in linear_shapes(config))
    return linear, config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)


# ------------------------------------------------------------------------------------------------ loading and saving


@dataclass
class Policy:
    """The model that is trained.  `model` is called like any causal LM; only its adapter has gradients."""

    model: PeftModel
    tokenizer: object
    device: torch.device
    name: str  # what the given name resolved to: a hub id, or the absolute path of a folder
    preset: Preset

    def trainable(self) -> list[torch.nn.Parameter]:
        """The adapter's parameters, fp32, in a fixed order."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def reference(self) -> contextlib.AbstractContextManager:
        """`with policy.reference():` the network is pi_ref, the frozen base; no second copy in memory."""
        return self.model.disable_adapter()


def resolve_model(name: str) -> str:
    """A folder (as absolute path) or a hub id.  "tiny" is the built-in model, a bare Qwen name its Instruct version."""
    if name == "tiny":
        if not (TINY_DIR / "config.json").is_file():
            raise UserError(f"the built-in model is missing from {TINY_DIR}: rebuild it with `python tiny.py`")
        return str(TINY_DIR)
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise UserError(f"--model {name}: the folder holds no config.json, so it is not a model's folder")
        return str(Path(name).resolve())
    if re.fullmatch(r"Qwen[\w.]*-[\d.]+B(-Instruct)?", name):
        instruct = "" if name.endswith("-Instruct") or name.startswith("Qwen3") else "-Instruct"
        return f"Qwen/{name}{instruct}"  # Qwen3's plain names are the instruction-tuned ones
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return name
    raise UserError(
        f"unknown model {name!r}: give tiny (built in), a Qwen name such as Qwen2.5-7B, a hub id owner/name, "
        "or a local folder with config.json, tokenizer and safetensors"
    )


@contextlib.contextmanager
def readable_errors(name: str) -> Iterator[None]:
    """Hub and file errors as one line that says what to do."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:  # OSError: also what the hub client's network errors are
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot load the model {name}: {reason} ... Without network, give a local folder that holds it "
            "(--model DIR), or train the built-in one (--model tiny)"
        ) from error


def offline(name: str) -> bool:
    """True if `name` is a hub id and the hub cannot be reached: then only its cached copy can be loaded."""
    if Path(name).is_dir():
        return False
    try:
        requests.head(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=10)
        return False
    except requests.RequestException:
        return True  # asked once here: the hub client asks for half a minute, loudly


def load_base(name: str, nf4: bool, device: torch.device, dtype: torch.dtype, cached_only: bool) -> torch.nn.Module:
    """The frozen base model in `dtype`, its blocks' linear layers in NF4 if asked.  Weights from safetensors only."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    with readable_errors(name):
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, device_map={"": device}, use_safetensors=True, attn_implementation="sdpa",
            quantization_config=quantization if nf4 else None, local_files_only=cached_only,
        )  # fmt: skip
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes repacks the weights in the first forward in eval mode and cannot
        # read them back in a training forward; this is the attribute its Linear4bit asks before it repacks.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.requires_grad_(False)


def load_adapter(base: torch.nn.Module, folder: Path) -> PeftModel:
    """The adapter saved in `folder`, trainable, over `base`.  UserError if it is missing, a pickle or another shape."""
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds no adapter (no adapter_config.json)")
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder} holds no adapter_model.safetensors; pickled adapters (.bin) are never loaded")
    try:
        return PeftModel.from_pretrained(base, folder, is_trainable=True)
    except (RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the adapter in {folder} does not fit the model: {reason}") from error


def load_policy(
    model: str,
    quantize: str = "auto",
    adapter: Path | None = None,
    lora_r: int = 16,
    lora_alpha: int = 32,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Policy:
    """Load `model` (see resolve_model) with a fresh LoRA adapter drawn from `seed`, or with the one in `adapter`.

    quantize: "nf4", "none", or "auto": nf4 on a GPU from 1e9 parameters on.  dtype: of the base, by default bf16 on
    a GPU and fp32 on the CPU.  Raises UserError for everything a user can get wrong.
    """
    name = resolve_model(model)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cached_only = offline(name)
    with readable_errors(name):
        config = AutoConfig.from_pretrained(name, local_files_only=cached_only)
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=cached_only)
    parameters = sum(parameter_counts(config))
    nf4 = quantize == "nf4" or (quantize == "auto" and device.type == "cuda" and parameters >= 1e9)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    base = load_base(name, nf4, device, dtype, cached_only)
    if adapter is not None:
        peft_model = load_adapter(base, Path(adapter))
    else:
        lora = LoraConfig(
            r=lora_r, lora_alpha=lora_alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            peft_model = get_peft_model(base, lora)  # adapter weights in fp32, B = 0: it begins as the reference
    if parameters >= 50e6:
        # Recompute each block in the backward pass.  Acts in train mode only, so sampling (eval) keeps its cache.
        peft_model.gradient_checkpointing_enable({"use_reentrant": False})
    return Policy(peft_model.eval(), tokenizer, device, name, preset_for(parameters))


def save_adapter(policy: Policy, folder: Path) -> None:
    """Write the adapter (safetensors) and the tokenizer; `peft.AutoPeftModelForCausalLM.from_pretrained(folder)` reads it.

    The base is named by hub id or, if it is a folder (the built-in model too), by absolute path: a stranger on another
    machine names it himself, `PeftModel.from_pretrained(base, folder)`; ours do so with `load_policy(..., adapter=)`.
    """
    policy.model.peft_config["default"].base_model_name_or_path = policy.name
    policy.model.save_pretrained(str(folder), save_embedding_layers=False)
    policy.tokenizer.save_pretrained(str(folder))
