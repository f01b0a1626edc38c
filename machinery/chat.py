"""Asking a language model: one behind an OpenAI-compatible server, or the policy's own base model."""
import threading

from machinery.web import WebError, bearer, call


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


def base_reply(policy, messages: list[dict], tokens: int = 32) -> str:
    """The greedy reply of the policy's base model: the same network with its adapter off, so no second copy.

    Qwen's own generation settings punish repetition, and a verdict repeats words of the prompt: so no penalty.
    """
    tokenizer, model, training = policy.tokenizer, policy.model, policy.model.training
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs = inputs.to(policy.device)    # input_ids: (1, T)
    model.eval()
    try:
        with policy.reference():
            out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, repetition_penalty=1.0,
                                 pad_token_id=tokenizer.eos_token_id)    # (1, T + new)
    finally:
        model.train(training)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
