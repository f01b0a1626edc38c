"""Shared by all tests: one torch thread (tiny models are fastest so, and bit-equal); our queue.py under its name;
Ctrl-C is heard, although a shell lets what it starts in the background ignore it."""
import signal
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)

import machinery.sample_queue    # noqa: E402, F401  pytest itself has imported the standard one: see queue.py
