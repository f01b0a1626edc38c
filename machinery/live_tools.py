"""Which of a run's web tools are live: asked once, before a run that may take hours and money.

Owns `preflight_table`. A tool is asked as the model's code would call it, and what it answers is recorded nowhere.
"""
import base64
import io
import wave
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from machinery.web import Cache, Web
from tools import Tool, ToolContext, preflight

PAGE = "https://example.com"
CALLS = {           # of the tools that need the network
    "web_search": ("weather",), "visit": (PAGE,), "find": (PAGE, "domain"), "download": (PAGE,), "wiki": ("Earth",),
    "archive": (PAGE, "2020-01-01"), "ask_image": ("grey.png", "Which colour?"), "transcribe": ("silence.wav",)}
GREY = (         # a picture of 64 x 64 pixels, PNG
    "iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAAAAACPAi4CAAAAKUlEQVR42u3MQREAAAwCIOMb2xD77SAA6VEEAoFAIBAIBAKBQCAQ"
    "fA8GHGyAeTN+MmkAAAAASUVORK5CYII=")


def silence() -> bytes:
    """A second of it, as a WAV file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, 16_000, 0, "NONE", None))
        sound.writeframes(bytes(32_000))
    return file.getvalue()


def answer_of(tool: Tool) -> str:
    """What a live tool says to its call; "" for one that needs no network."""
    if tool.name not in CALLS:
        return ""
    context = ToolContext(files={"grey.png": base64.b64decode(GREY), "silence.wav": silence()})
    return tool.bind(context)(*CALLS[tool.name])


def preflight_table(tools: list[Tool], web: Web, ask: bool) -> str:
    """A line for each web tool of the run, and for each that was left out; "" without any. ask: call each once."""
    if not any(tool.web for tool in tools):
        return ""
    why = {tool.name: f"left out: {reason}" for tool, reason in preflight(web) if reason}
    live = [replace(tool, web=replace(web, cache=Cache()), log=None) for tool in tools if tool.web]
    answers = [""] * len(live)
    if ask and web.cache.mode != "replay":
        with ThreadPoolExecutor(len(live)) as pool:
            answers = list(pool.map(answer_of, live))
    for tool, answer in zip(live, answers):
        why[tool.name] = f"does not answer: {answer[:100]}" if answer.startswith("ERROR[") else "live"
    return "".join(f"  {name:<12} {text}\n" for name, text in why.items())
