"""Which of a run's web tools are live: asked once, before a run that may take hours and money.

Owns `preflight_table`. What a tool answers here is recorded nowhere.
"""
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from machinery.api import bearer, call
from machinery.documents import WebError
from machinery.web import Cache, Web
from tools import Tool, ToolContext, preflight

PAGE = "https://example.com"
CALLS = {                       # as the model's code would call the tools
    "web_search": ("weather",), "visit": (PAGE,), "find": (PAGE, "domain"), "download": (PAGE,), "wiki": ("Earth",),
    "archive": (PAGE, "2020-01-01")}
SERVERS = {"ask_image": "VISION", "transcribe": "AUDIO"}        # asked which models they serve: costs nothing


def answer_of(tool: Tool) -> str:
    """What a live tool's back end says; "" for one that needs none."""
    if tool.name in CALLS:
        return tool.bind(ToolContext())(*CALLS[tool.name])
    if tool.name not in SERVERS:
        return ""
    url, key = (os.environ.get(f"{SERVERS[tool.name]}_{part}", "") for part in ("URL", "API_KEY"))
    try:
        return str(call(f"{url.rstrip('/')}/models", 10.0, headers=bearer(key)))
    except WebError as error:
        return str(error)


def preflight_table(tools: list[Tool], web: Web, ask: bool) -> str:
    """A line for each web tool of the run, and for each that was left out; "" without any. ask: call each once."""
    live = [replace(tool, web=replace(web, cache=Cache()), log=None) for tool in tools if tool.web]
    if not live:
        return ""
    answers = [""] * len(live)
    if ask and web.cache.mode != "replay":
        with ThreadPoolExecutor() as pool:
            answers = list(pool.map(answer_of, live))
    rows = {tool.name: f"left out: {why}" for tool, why in preflight(web) if why}
    for tool, answer in zip(live, answers):
        rows[tool.name] = f"does not answer: {answer[:100]}" if answer.startswith("ERROR[") else "live"
    return "".join(f"  {name:<12} {text}\n" for name, text in rows.items())
