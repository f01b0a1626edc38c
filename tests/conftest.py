"""Shared by all tests: one torch thread (tiny models are fastest so, and bit-equal); our queue.py under its name."""
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

import queue    # noqa: E402  pytest itself has imported the standard one: see queue.py

if not hasattr(queue, "SampleQueue"):
    spec = spec_from_file_location("queue", ROOT / "queue.py")
    spec.loader.exec_module(module_from_spec(spec))
