"""The policy: a frozen language model, a LoRA adapter on it, and all that depends on the model's size.

Owns names and loading, NF4, the adapter on disk, the reference policy (the same network, adapter off) and the
defaults per size. Reading order: Preset, Policy, load_policy, save_adapter.

QLoRA (arXiv 2305.14314) as built here: the blocks' linear layers in NF4 with double quantisation, embeddings,
head and norms in bf16, the adapter in fp32 on all linear layers but the head, without dropout, so that
sampler and scorer see one network in any mode. PEFT's `prepare_model_for_kbit_training` is not used: it
copies embeddings and head to fp32 (+2 GiB at 7B). The adapter is never merged: in 4 bits most of it would be
rounded away.
"""
import hashlib
import json
import logging
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import requests
import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it; it misses a CPU kernel
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)     # peft asks by an old name
from peft import LoraConfig, PeftModel, get_peft_model          # noqa: E402
from safetensors import safe_open                               # noqa: E402
from transformers import (                                      # noqa: E402
    AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast, Qwen2Config)

from machinery.folder import reading                            # noqa: E402
from tools import UserError                                     # noqa: E402

TINY_DIR = Path(__file__).resolve().parent / "tiny"             # built in; scripts/warm_start.py made it


# --------------------------------------------------------------------------------------- what depends on size
@dataclass(frozen=True)
class Preset:
    """How a model of some size is prompted, and what differs from the defaults in train.py's Config, which are a 7B
    model's. Flags override both."""
    prompt: str = "full"        # "full" documents the tools; "short" is what the built-in model was made with
    settings: Mapping[str, object] = field(default_factory=dict)


TINY = Preset("short", {
    "max_turns": 4, "turn_tokens": 96, "context_tokens": 512, "observation_tokens": 64, "groups": 12, "steps": 50,
    "lr": 1e-3, "schedule": "cosine", "minibatches": 3, "token_budget": 2048, "eval_every": 25, "eval_tasks": 52})

SMALL = Preset("full", {        # for SmolLM2-135M after its warm start, on two CPU cores
    "max_turns": 4, "turn_tokens": 96, "context_tokens": 1536, "observation_tokens": 256, "groups": 12,
    "online_groups": 8, "replay": "positive", "half_life": 8.0, "max_age": 16, "resample": 1, "steps": 8, "lr": 4e-4,
    "warmup": 2, "epochs": 2, "minibatches": 2, "beta": 0.0, "token_budget": 2048, "eval_every": 8, "eval_tasks": 6})


def preset_for(parameters: int) -> Preset:
    """Below 50 million parameters that of the built-in model; among the others, smaller ones bear larger steps."""
    if parameters < 50e6:
        return TINY
    if parameters < 300e6:
        return SMALL
    return Preset("full", {"lr": 5e-5 if parameters < 1e9 else 2e-5 if parameters < 5e9 else 1e-5})


def head_size(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def linear_shapes(config) -> list[tuple[int, int]]:
    """(in, out) of the linear layers of one block of a Llama-shaped model (Llama, Mistral, Qwen2, Qwen3)."""
    h, i, size = config.hidden_size, config.intermediate_size, head_size(config)
    q, kv = config.num_attention_heads * size, config.num_key_value_heads * size
    return [(h, q), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h)]


def parameter_counts(config) -> tuple[int, int]:
    """(in the blocks' linear layers, in embedding and head). Norms and biases are below 0.01 %."""
    linear = config.num_hidden_layers * sum(a * b for a, b in linear_shapes(config))
    return linear, config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)


# ----------------------------------------------------------------------------------------- loading and saving
@dataclass
class Policy:
    """What is trained. `model` is called like any causal LM; only its adapter has gradients."""
    model: PeftModel
    tokenizer: object
    device: torch.device
    name: str                       # what the given name resolved to: a hub id, or a folder's absolute path
    preset: Preset
    base_weights: str = ""          # see weights_hash

    def trainable(self) -> list[torch.nn.Parameter]:
        """The adapter's parameters, fp32, always in the same order."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def reference(self):
        """`with policy.reference():` the network is the reference policy, the base alone. No second copy."""
        return self.model.disable_adapter()


def resolve_model(name: str) -> str:
    """A folder's absolute path or a hub id. tiny: the built-in model; a bare Qwen name: its Instruct."""
    if name == "tiny" or Path(name).is_dir():
        folder = TINY_DIR if name == "tiny" else Path(name).resolve()
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} is no model: it has no config.json")
        return str(folder)
    if re.fullmatch(r"Qwen[\w.]*-[\d.]+B(-Instruct)?", name):
        plain = name.endswith("-Instruct") or name.startswith("Qwen3")  # Qwen3's plain ones are tuned
        return f"Qwen/{name}" + ("" if plain else "-Instruct")
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        return name
    raise UserError(f"unknown model {name!r}: give tiny (built in), a Qwen name such as Qwen2.5-7B, a hub id "
                    "owner/name, or a local folder with config.json, tokenizer and safetensors")


def offline(name: str) -> bool:
    """True if `name` is on the hub, and the hub out of reach: only a cached copy can be loaded."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        Path(name).is_dir() or requests.head(hub, timeout=10)
        return False
    except requests.RequestException:
        return True                 # asked here once: the hub client asks for half a minute, loudly


HUB_HINT = "Without network, give a local folder (--model DIR) or take the built-in model (--model tiny)"
NOT_CACHED = "the hub is out of reach, and {} is not cached. " + HUB_HINT


def in_nf4(quantize: str, parameters: int, on_gpu: bool) -> bool:
    """Whether "nf4", "none" or "auto" means NF4: "auto" does on a GPU from 1e9 parameters on."""
    if quantize not in ("auto", "none", "nf4"):
        raise UserError(f"--quantize {quantize}: it is auto, none or nf4")
    return quantize == "nf4" or (quantize == "auto" and on_gpu and parameters >= 1e9)


def load_base(name: str, nf4: bool, device: torch.device, dtype: torch.dtype, away: bool) -> torch.nn.Module:
    """The frozen base in `dtype`, its blocks in NF4 if asked. Weights are read from safetensors only."""
    nf4_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                    bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    with reading(f"the model {name}", HUB_HINT):
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, device_map={"": device}, use_safetensors=True, attn_implementation="sdpa",
            quantization_config=nf4_config if nf4 else None, local_files_only=away)
    never_repack(model)
    return model.requires_grad_(False)


def need_gpu(why: str):
    """UserError where torch can use no GPU: a model would silently be loaded into main memory, in fp32."""
    if not torch.cuda.is_available():
        remedy = "install a build of it for CUDA (https://pytorch.org)"
        if torch.version.cuda:
            remedy = f"check the driver with nvidia-smi (torch is built for CUDA {torch.version.cuda})"
        raise UserError(f"{why}, and torch {torch.__version__} finds no usable GPU: {remedy}, or take a smaller model "
                        "(tiny needs none)")


def need_bf16():
    """UserError where the GPU cannot compute in bf16."""
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"{torch.cuda.get_device_name()} cannot compute in bf16: RTX 30xx and newer cards can")


def cpu_computes_bf16() -> bool:
    """Whether this CPU has instructions for products in bf16. They take half the time of those in fp32."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.is_file() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def never_repack(model: torch.nn.Module):
    """On CPUs with AVX512-BF16 bitsandbytes repacks NF4 weights in the first eval forward, and no training
    forward can read them afterwards. This is the attribute that it asks before it does so."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def load_adapter(base: torch.nn.Module, folder: Path) -> PeftModel:
    """The adapter in `folder`, trainable. UserError if there is none, a pickle, or one for another base."""
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds no adapter: it has no adapter_config.json")
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder} has no adapter_model.safetensors; pickled adapters (.bin) are never read")
    with reading(f"the adapter in {folder}", "Was it made for another model, or is a file damaged?"):
        return PeftModel.from_pretrained(base, folder, is_trainable=True)


def weights_hash(name: str) -> str:
    """A hash of two rows of each of the base's tensors, as they lie on disk: so no quantisation or dtype changes it."""
    folder = name if Path(name).is_dir() else snapshot_download(name, local_files_only=True)
    rows = {}
    for file in Path(folder).glob("model*.safetensors"):
        with safe_open(file, "pt") as tensors:
            rows |= {key: tensors.get_slice(key)[:2].bfloat16() for key in tensors.keys()}
    digest = hashlib.sha256()
    for key in sorted(rows):
        digest.update(rows[key].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def check_base(folder: Path, name: str, weights: str):
    """UserError if the adapter in `folder` was trained on another base than that of this name and hash. The hash is in
    train.py's run.json; without it the last part of the base's name decides."""
    run, config = folder / "run.json", folder / "adapter_config.json"
    with reading(folder):
        known = json.loads(run.read_text()).get("base_weights") if run.is_file() else None
        made_for = str(json.loads(config.read_text())["base_model_name_or_path"])
    what, ours, its = ("weights", weights, known) if known else ("name", Path(name).name, Path(made_for).name)
    if ours != its:
        raise UserError(f"{folder} was trained on {made_for}, and {name} differs in its {what}: give the adapter its "
                        "own base, or eval_gaia.py --any-base")


LORA_RANK = 16


def new_adapter(base: torch.nn.Module, seed: int = 0, rank: int = LORA_RANK) -> PeftModel:
    """A LoRA adapter in fp32 on all linear layers but the head; its B is 0, so it begins as the reference."""
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(base, lora)


def load_policy(model: str, quantize: str = "auto", adapter: Path | None = None, seed: int = 0,
                dtype: torch.dtype | None = None, lora_rank: int = LORA_RANK, any_base: bool = False) -> Policy:
    """Load `model` (see resolve_model) with the adapter in a folder, or with a new one drawn from `seed`.

    quantize: see in_nf4. dtype: of the base; default: from 50 million parameters on bf16, if the device computes it
    well, else fp32. The GPU is torch's current one. For a tiny model torch goes on with one thread, in the whole
    process. UserError for whatever a user can get wrong.
    """
    name, config, on_gpu = resolve_model(model), model_config(model), torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    torch.backends.cuda.enable_cudnn_sdp(False)     # cuDNN plans its attention anew for each shape: 1 s each on Hopper
    parameters = sum(parameter_counts(config))
    if parameters >= 1e9:           # said before anything is downloaded
        need_gpu(f"{name} has {parameters / 1e9:.1f}e9 parameters")
    away = offline(name)
    if away and try_to_load_from_cache(name, "tokenizer.json") is None:
        raise UserError(NOT_CACHED.format(name))
    with reading(f"the tokenizer of {name}", HUB_HINT):
        # tokenizer.json as it is: AutoTokenizer builds a Qwen2 tokenizer, without the tiny one's splitting
        tokenizer = PreTrainedTokenizerFast.from_pretrained(name, local_files_only=away)
    if parameters < 50e6:
        torch.set_num_threads(1)    # the tiny model's fastest; leaves the sandbox a core
    nf4 = in_nf4(quantize, parameters, on_gpu)
    if dtype is None:               # rounding hurts a small model, and fp32 costs it nothing
        able = on_gpu or (cpu_computes_bf16() and not nf4)     # NF4 on a CPU was only ever run in fp32
        dtype = torch.bfloat16 if able and parameters >= 50e6 else torch.float32
    if dtype == torch.bfloat16 and on_gpu:
        need_bf16()
    base = load_base(name, nf4, device, dtype, away)
    weights = weights_hash(name)
    network = load_adapter(base, Path(adapter)) if adapter else new_adapter(base, seed, lora_rank)
    if adapter and not any_base:    # shapes alone do not tell Base, Instruct and Coder of one size apart
        check_base(Path(adapter), name, weights)
    # each block is computed again in the backward pass, in train mode only; on a GPU the memory plan counts on it
    if parameters >= (50e6 if on_gpu else 300e6):
        network.activation_checkpointing_enable({"use_reentrant": False})
    return Policy(network.eval(), tokenizer, device, name, preset_for(parameters), weights)


def save_adapter(policy: Policy, folder: Path):
    """Adapter (safetensors) and tokenizer, for `peft.AutoPeftModelForCausalLM.from_pretrained(folder)`. The file names
    the base by hub id, or by absolute path if it is a folder; `load_policy` does not need that name."""
    policy.model.peft_config["default"].base_model_name_or_path = policy.name
    policy.model.save_pretrained(folder, save_embedding_layers=False)
    policy.tokenizer.save_pretrained(folder)


# ------------------------------------------------------------------------------------ shapes without a download
QWEN25 = {      # hidden, MLP, blocks, heads, key heads, vocabulary, tied: for plans without a download
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "Qwen2.5-3B": (2048, 11008, 36, 16, 2, 151936, True),
    "Qwen2.5-7B": (3584, 18944, 28, 28, 4, 152064, False),
    "Qwen2.5-14B": (5120, 13824, 48, 40, 8, 152064, False),
}


def model_config(model: str):
    """The shape of a model; of the Qwen2.5 family without network."""
    if model in QWEN25:
        keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "vocab_size", "tie_word_embeddings")
        return Qwen2Config(**dict(zip(keys, QWEN25[model])))
    name = resolve_model(model)
    away = offline(name)
    with reading(f"the model {name}", HUB_HINT):
        config = AutoConfig.from_pretrained(name, local_files_only=away)
        parameter_counts(config)                                # raises for shapes that are not Llama's
        return config
