"""`train.py --check`: what a run needs, what of it is there and what is missing, before a model of 15 GB is downloaded.

Owns the table. Each line tries the real thing as far as it goes without the weights: it multiplies in NF4, runs a cell
in the sandbox, asks the hub for the sizes of the files. Read in this order: `check`, then the lines as it calls them.
"""
import json
import os
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import requests
import torch

from executor import Executor
from machinery.cli import UserError
from machinery.memory import GIB, planned
from machinery.versions import PINNED, other_versions
from policy import (
    NOT_CACHED, in_nf4, linear_shapes, model_config, need_bf16, need_gpu, offline, parameter_counts, resolve_model)
import bitsandbytes                                         # after policy, which quiets its import
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import build_hf_headers


class Line(NamedTuple):
    """Of the table. state: ok; warning: the run starts without it; MISSING: the run does not start."""
    what: str
    state: str
    found: str


def check(cfg, settled: set[str]) -> None:
    """Print the table; UserError if this run would not start. settled: settings that no plan may change."""
    config = model_config(cfg.model)
    parameters = sum(parameter_counts(config))
    gpu = parameters >= 1e9 or cfg.vram is not None
    weights, download = find_weights(resolve_model(cfg.model), 2 * parameters)
    lines = [packages(), card(gpu, parameters), driver(gpu), nf4_kernel(cfg.quantize, parameters),
             sandbox(cfg.sandbox), weights, disk(cfg, config, download), memory_plan(cfg, settled)]
    for line in lines:
        print(f"{line.what:<16}{line.state:<9}{line.found}")
    missing = [line.what for line in lines if line.state == "MISSING"]
    if missing:
        raise UserError(f"this run would not start; the table says what to do about: {', '.join(missing)}")
    print("this run would start")


def packages() -> Line:
    differ = other_versions()
    if differ:
        return Line("packages", "warning", ", ".join(differ))
    return Line("packages", "ok", ", ".join(f"{name} {version(name)}" for name in (*PINNED, "bitsandbytes")))


# ---------------------------------------------------------------------------------------------------- the card
def card(needed: bool, parameters: float) -> Line:
    """The GPU that torch would use."""
    try:
        if torch.cuda.is_available():
            if parameters >= 50e6:
                need_bf16()
            return Line("card", "ok", f"{torch.cuda.get_device_name()}, {card_gib():.1f} GiB")
        if needed:
            need_gpu("this model, or --vram, needs a GPU")
    except UserError as error:
        return Line("card", "MISSING", str(error))
    return Line("card", "ok", "none is used; a model of this size trains on the CPU")


def card_gib() -> float:
    return torch.cuda.mem_get_info()[1] / GIB


def driver(needed: bool) -> Line:
    """NVIDIA's driver. torch refuses one that is older than its CUDA; the line of the card then says so."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=30)
        if found.returncode == 0:
            return Line("driver", "ok", "; ".join(found.stdout.splitlines()))
        text = " ".join((found.stdout + found.stderr).split())[:200]
    except (OSError, subprocess.TimeoutExpired):
        text = "nvidia-smi does not run: install NVIDIA's driver, on WSL2 that of Windows"
    if needed:
        return Line("driver", "MISSING", text)
    return Line("driver", "ok", "none is needed")


def nf4_kernel(quantize: str, parameters: float) -> Line:
    """One product with NF4 weights, beside the same with the weights dequantised."""
    what, device = "bitsandbytes", "cuda" if torch.cuda.is_available() else "cpu"
    if not in_nf4(quantize, parameters, device == "cuda" or parameters >= 1e9):
        return Line(what, "ok", "NF4 is not used")
    try:
        layer = bitsandbytes.nn.Linear4bit(256, 512, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer, x = layer.to(device), torch.randn(4, 256, dtype=torch.bfloat16, device=device)
        weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        with torch.no_grad():
            error = (layer(x).float() - x.float() @ weight.float().T).abs().max().item()
    except (RuntimeError, OSError, AttributeError, NotImplementedError) as failure:
        return Line(what, "MISSING", f"its NF4 kernel fails on {device}: {' '.join(str(failure).split())[:200]}")
    if error > 0.1:
        return Line(what, "MISSING", f"its NF4 product on {device} is wrong by {error:.2g}: install another version")
    return Line(what, "ok", f"an NF4 product on {device}, right within {error:.1g}")


# --------------------------------------------------------------------------------------- sandbox, hub, disk, memory
def sandbox(kind: str) -> Line:
    """One cell in the sandbox that the run would use."""
    try:
        with Executor(kind) as executor, executor.session() as session:
            status = session.execute("x = 1").status
    except UserError as error:
        return Line("sandbox", "MISSING", str(error))
    if status != "ok":
        return Line("sandbox", "MISSING", f"a first cell ended with the status {status}")
    if executor.sandbox == "none":
        return Line("sandbox", "warning", "none: model-written code can read and change your files. Install bubblewrap")
    return Line("sandbox", "ok", executor.sandbox)


def find_weights(name: str, size: int) -> tuple[Line, int]:
    """(the line of the weights, bytes that have to be downloaded). size: of the weights, where the hub does not say."""
    def line(state: str, found: str, download: int = 0):
        return Line("weights", state, found), download
    if Path(name).is_dir():
        size = sum(file.stat().st_size for file in Path(name).glob("*.safetensors"))
        if size:
            return line("ok", f"{size / GIB:.2f} GiB in {name}")
        return line("MISSING", f"no *.safetensors in {name}")
    if offline(name):
        if cached(name):
            return line("ok", f"the hub is out of reach; {name} is in {constants.HF_HUB_CACHE}")
        return line("MISSING", NOT_CACHED.format(name), size)
    try:
        sizes = file_sizes(name)
    except (requests.RequestException, ValueError, KeyError) as error:
        return line("MISSING", f"the hub gives no access to {name} ({' '.join(str(error).split())[:120]}): is the name "
                               "right? For a gated model accept its terms on its page, and set HF_TOKEN", size)
    here = sum(size for file, size in sizes.items() if isinstance(try_to_load_from_cache(name, file), str))
    download = sum(sizes.values()) - here
    if not sizes:
        return line("MISSING", f"{name} has no safetensors; other formats are never read")
    return line("ok", f"{name}: {download / GIB:.1f} GiB to download, {here / GIB:.1f} are here", download)


def file_sizes(name: str) -> dict[str, int]:
    """{file of weights: bytes} on the hub, after a look whether its files may be read at all (gated models)."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    for path in (f"{name}/resolve/main/config.json", f"api/models/{name}?blobs=true"):
        answer = requests.get(f"{hub}/{path}", headers=build_hf_headers(), timeout=20)
        answer.raise_for_status()
    return {file["rfilename"]: file["size"] for file in answer.json()["siblings"]
            if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", file["rfilename"])}


def cached(name: str) -> bool:
    """Whether all weights of a model are in the hub's cache."""
    index = try_to_load_from_cache(name, "model.safetensors.index.json")
    files = {"model.safetensors"}
    if isinstance(index, str):
        files = set(json.loads(Path(index).read_text("utf-8"))["weight_map"].values())
    return all(isinstance(try_to_load_from_cache(name, file), str) for file in files)


def disk(cfg, config, download: int) -> Line:
    """Room for the download, and in --out for adapters (the last, the best) and three checkpoints."""
    adapter = 4 * config.num_hidden_layers * cfg.lora_rank * sum(a + b for a, b in linear_shapes(config))   # fp32
    wanted, found, short = {}, [], False
    for folder, size in ((Path(constants.HF_HUB_CACHE), download), (Path(cfg.out).resolve(), (2 + 3 * 3) * adapter)):
        while not folder.exists():
            folder = folder.parent
        disk = folder.stat().st_dev
        wanted[disk] = wanted.get(disk, 0) + size
        free = shutil.disk_usage(folder).free
        short |= free < wanted[disk]
        found.append(f"{folder}: {size / GIB:.1f} GiB needed, {free / GIB:.1f} free")
    return Line("disk", "MISSING" if short else "ok", "; ".join(found))


def memory_plan(cfg, settled: set[str]) -> Line:
    """The plan for --vram GIB, or for the card as it is with the settings as they are."""
    vram = cfg.vram
    if vram is None:
        if not torch.cuda.is_available():
            return Line("memory plan", "ok", "made for GPUs only; --vram 24 makes that of a card of 24 GiB")
        vram, settled = card_gib(), {"context_tokens", "slots", "token_budget"}
    try:
        plan = planned(cfg, vram, settled)
    except UserError as error:
        return Line("memory plan", "MISSING", str(error))
    return Line("memory plan", "ok", f"at most {max(plan.peaks):.1f} of {vram:.1f} GiB with {plan.chosen}")
