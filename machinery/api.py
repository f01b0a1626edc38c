"""Requests to JSON interfaces, to models behind OpenAI-compatible servers, and to the policy's base model."""
import base64
import hashlib
import math
import mimetypes
import os
import threading
import time
from pathlib import PurePosixPath
from urllib.parse import urlsplit

import requests

from machinery.documents import WebError


def call(url: str, seconds: float, **request):
    """The JSON of one POST (with `json`, `data` or `files`) or GET to a trusted API; retried with longer pauses."""
    deadline, method = time.monotonic() + seconds, "GET" if set(request) <= {"params", "headers"} else "POST"
    for pause in (0.5, 1.0, 2.0, math.inf):
        try:
            response = requests.request(method, url, timeout=max(deadline - time.monotonic(), 0.1), **request)
            status, kind = response.status_code, f"http_{response.status_code}"
            passing = status in (200, 429) or status >= 500
            if status == 200:
                answer, kind = response.json(), "bad_answer"
                if not (isinstance(answer, dict) and answer.get("error")):    # MediaWiki, when busy, says so here
                    return answer
        except requests.exceptions.JSONDecodeError:
            kind, passing = "bad_answer", False
        except requests.RequestException as error:
            kind, passing = "timeout" if isinstance(error, requests.Timeout) else "network", True
        if not passing or time.monotonic() + pause > deadline:
            break
        time.sleep(pause)
    raise WebError(kind, f"{urlsplit(url).hostname} did not answer as it should")


def bearer(key: str) -> dict:
    return {"Authorization": f"Bearer {key}"} if key else {}


def models_of(server: str) -> str:
    """The models that the server of VISION_URL or AUDIO_URL names, as text: asking costs nothing."""
    url, key = (os.environ.get(f"{server}_{part}", "") for part in ("URL", "API_KEY"))
    try:
        return str(call(f"{url.rstrip('/')}/models", 10.0, headers=bearer(key)))
    except WebError as error:
        return str(error)


class ChatModel:
    """The policy's base model (spec "local"), or the model `name` behind the base URL `spec`. Thread-safe."""

    def __init__(self, spec: str, name: str | None, policy, key: str, concurrency: int, seconds: float):
        self.spec, self.policy, self.key, self.seconds = spec, policy, key, seconds
        self.name = policy.name if spec == "local" else name
        self.limit = threading.Semaphore(1 if spec == "local" else concurrency)    # requests at one time

    def reply(self, messages: list[dict]) -> str:
        """WebError if the server cannot be reached, or does not answer within `seconds`."""
        with self.limit:
            if self.spec == "local":
                return base_reply(self.policy, messages)
            return chat(self.spec, self.name, messages, self.key, self.seconds, tokens=256)


def chat(url: str, model: str, messages: list[dict], key: str = "", seconds: float = 60.0, tokens: int = 512) -> str:
    """The reply of an OpenAI-compatible server; `url` is what its documentation calls the base URL."""
    answer = call(f"{url.rstrip('/')}/chat/completions", seconds, headers=bearer(key),
                  json={"model": model, "messages": messages, "temperature": 0, "max_tokens": tokens})
    try:
        return str(answer["choices"][0]["message"]["content"] or "")
    except (KeyError, IndexError, TypeError) as error:
        raise WebError("bad_answer", "the model's server did not answer with a message") from error


def base_reply(policy, messages: list[dict]) -> str:
    """The greedy reply of the base model: the same network with its adapter off. Qwen's own generation settings punish
    repetition, and a verdict repeats words of the prompt: so no penalty."""
    tokenizer, model, training = policy.tokenizer, policy.model, policy.model.training
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs = inputs.to(policy.device)    # input_ids: (1, T)
    model.eval()
    try:
        with policy.reference():
            out = model.generate(**inputs, max_new_tokens=32, do_sample=False, repetition_penalty=1.0,
                                 pad_token_id=tokenizer.eos_token_id)    # (1, T + new)
    finally:
        model.train(training)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)


def ask_about_image(web, body: bytes, path: str, question: str) -> str:
    """What the vision model says of an image; WebError if it cannot be asked."""
    url, model, key = (os.environ.get(f"VISION_{part}", "") for part in ("URL", "MODEL", "API_KEY"))
    data = f"data:{mimetypes.guess_type(path)[0] or 'image/png'};base64,{base64.b64encode(body).decode()}"
    content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": data}}]
    return web.answer("ask_image", {"image": hashlib.sha256(body).hexdigest(), "question": question},
                      web.cache.backend_of("ask_image", model),
                      lambda: chat(url, model, [{"role": "user", "content": content}], key))


def spoken_words(web, body: bytes, path: str) -> str:
    """What the audio model hears in a file; WebError if it cannot be asked."""
    url, model, key = (os.environ.get(f"AUDIO_{part}", "") for part in ("URL", "MODEL", "API_KEY"))
    return web.ask("transcribe", {"audio": hashlib.sha256(body).hexdigest()},
                   web.cache.backend_of("transcribe", model), url.rstrip("/") + "/audio/transcriptions",
                   lambda answer: answer["text"], headers=bearer(key),
                   data={"model": model}, files={"file": (PurePosixPath(path).name, body)})
