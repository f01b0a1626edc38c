"""The naive way to sample, as short as it goes: `generate` for every turn, always from the first token.

The engine is tested and measured against this oracle. It takes the same episodes, so the protocol is the same. Only
the generation differs: batches are padded on the left, the history is forwarded again in every turn, and all rows
wait for the slowest row and for the slowest tool.
"""
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import GenerationConfig, StoppingCriteria


class TurnEnds(StoppingCriteria):
    """Stops row i when its episode says that the turn has ended, or at the limit of its tokens."""

    def __init__(self, episodes, limits, watch, start):
        self.episodes, self.limits, self.watch, self.start = episodes, limits, watch, start
        self.lengths = [0] * len(episodes)   # of the turns that have ended; 0: goes on

    def __call__(self, input_ids, scores, **_):                                     # (B, start + n)
        n = input_ids.shape[1] - self.start
        for i, newest in enumerate(input_ids[:, -1].tolist()):
            if self.lengths[i] == 0 and (self.watch[newest] or n == self.limits[i]):
                if n == self.limits[i] or self.episodes[i].ended(input_ids[i, self.start:].tolist()):
                    self.lengths[i] = n
        return torch.tensor([n > 0 for n in self.lengths], device=input_ids.device)


@torch.no_grad()
def one_turn(model, rows: list[list[int]], episodes, limits, watch, temperature) -> list[list[int]]:
    """The next turn of every row: generate over the left-padded histories."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows], device=model.device)               # (B, T)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=model.device)   # (B, T)
    ends = TurnEnds(episodes, limits, watch, width)
    how = dict(do_sample=True, temperature=temperature, top_k=0) if temperature else {}     # default top_k: 50
    config = GenerationConfig(max_new_tokens=max(limits), pad_token_id=0, **how)
    config.eos_token_id = None
    out = model.generate(ids, attention_mask=mask, generation_config=config, stopping_criteria=[ends])
    return [out[i, width:width + n].tolist() for i, n in enumerate(ends.lengths)]


def oracle(model, episodes: list, context: int, temperature: float, watch, batch: int):
    """Yields (episode, ids, mask) of each trajectory; samples `batch` of them at a time."""
    for begin in range(0, len(episodes), batch):
        alive = episodes[begin:begin + batch]
        ids = {e: list(e.prompt) for e in alive}
        mask = {e: [0] * len(e.prompt) for e in alive}
        while alive:
            limits = [min(e.turn_tokens, context - len(ids[e])) for e in alive]
            turns = one_turn(model, [ids[e] for e in alive], alive, limits, watch, temperature)
            for e, turn in zip(alive, turns):
                ids[e] += turn
                mask[e] += [1] * len(turn)
                limit = "context_limit" if len(ids[e]) == context else "length"
                e.close_turn(turn, "" if e.ended(turn) else limit)
            with ThreadPoolExecutor(len(alive)) as pool:
                results = list(pool.map(lambda e: e.act(), alive))
            going = []
            for e, result in zip(alive, results):
                if forced := e.observe(result, context - len(ids[e])):
                    ids[e] += forced
                    mask[e] += [0] * len(forced)
                    going.append(e)
                else:
                    e.close()
                    yield e, ids[e], mask[e]
            alive = going
