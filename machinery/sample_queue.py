"""`SampleQueue` of our queue.py, also in a process that has imported the standard library's `queue` first (pytest, a
notebook, a debugger). See the docstring of queue.py."""
import queue
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

if not hasattr(queue, "SampleQueue"):
    spec = spec_from_file_location("queue", Path(__file__).resolve().parent.parent / "queue.py")
    spec.loader.exec_module(module_from_spec(spec))

Entry, SampleQueue = queue.Entry, queue.SampleQueue
