"""What the benchmarks measure with: seconds, memory, and the machine that they were measured on."""
import gc
import os
import platform
import re
import time
from pathlib import Path

import torch
import transformers


def process_gib(name: str) -> float:
    """GiB of this process: VmRSS, those it has now, or VmHWM, their peak."""
    return int(re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20


def measured(device: torch.device, work) -> tuple[object, dict]:
    """(work(), its figures): seconds, GiB at the peak, and GiB at the peak above what was held before. On the CPU:
    processor seconds, as other programs do not count, and the memory that the kernel counts for this process."""
    gpu = device.type == "cuda"

    def gib(name: str, counter) -> float:
        return counter() / 2**30 if gpu else process_gib(name)
    gc.collect()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")       # VmHWM, the peak of VmRSS, begins again
    held, wall, cpu = gib("VmRSS", torch.cuda.memory_allocated), time.perf_counter(), time.process_time()
    result = work()
    if gpu:
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = gib("VmHWM", torch.cuda.max_memory_allocated)
    return result, {"seconds": wall if gpu else cpu, "wall_s": wall, "peak_gib": peak, "gib": peak - held}


def cap_memory(gib: float) -> None:
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))


def machine() -> dict:
    """What the figures were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "gpu": gpu,
            "torch": torch.__version__, "transformers": transformers.__version__,
            "date": time.strftime("%Y-%m-%d", time.gmtime())}
