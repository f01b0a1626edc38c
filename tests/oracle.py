"""The naive way to sample, as short as it goes: `generate` for every turn, from the first token on again.

The oracle that `rollout.Engine` is tested and measured against. It takes the same episodes, so the protocol
is the same; only the generation differs: batches padded on the left, the history forwarded again every turn,
and everybody waits for the slowest row and for the slowest tool.
"""
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import GenerationConfig, StoppingCriteria


class TurnEnds(StoppingCriteria):
    """Stops row i once its episode says that the turn has ended, or at its limit."""

    def __init__(self, episodes, limits, watch, start):
        self.episodes, self.limits, self.watch, self.start = episodes, limits, watch, start
        self.lengths = [0] * len(episodes)   # of the turns that ended

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
    how = dict(do_sample=True, temperature=temperature, top_k=0) if temperature else {}     # top_k is 50 else
    config = GenerationConfig(max_new_tokens=max(limits), pad_token_id=0, **how)
    config.eos_token_id = None
    out = model.generate(ids, attention_mask=mask, generation_config=config, stopping_criteria=[ends])
    return [out[i, width:width + n].tolist() for i, n in enumerate(ends.lengths)]


def oracle(model, episodes: list, context: int, temperature: float, watch, batch: int):
    """Yields (episode, ids, mask) for each; `batch` trajectories at a time."""
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
                cut = "context_limit" if len(ids[e]) == context else "length"
                e.close_turn(turn, "" if e.ended(turn) else cut)
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
