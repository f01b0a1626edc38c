"""The fast update: every distinct prefix of a micro-batch goes through the network once.

Same results as `grpo.token_logps`, which pads trajectories and forwards each of them whole. But all trajectories begin
alike: with the system prompt, siblings with the question too, often with the first turn. Here the tokens of a
micro-batch are a tree: a token stands in it once for all trajectories that agree up to it. The tree is cut into
segments (runs without a branch), which lie end to end in ONE row of N tokens. Linear layers, the head and activation
checkpointing see that row alone, without padding; only attention knows of the tree: a segment attends to its ancestors
and, causally, to itself. A position is the depth in the tree. A trajectory gathers its log-probs along its path, so a
token that siblings share gets the sum of their gradients, exactly.

Read in this order: `prefix_tree` (a pure function), `Tree`, `attend`, `tree_logps`.

The idea for one shared prompt is known as prefix grouping (unsloth's PrefixGrouper); trees are proposed in TRL (#7328),
verl (#6401) and NeMo-RL (#4008).
"""
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from machinery.head import head_logps

SHORTEST = 8        # a branch-free run shorter than this is repeated below its branches: one attention call less
LONGEST = 512       # a longer one is cut, unless it is a root: one mask would be as large as a segment times its depth


@dataclass
class Segment:
    """tokens ids[start:end] of a row, seen by the sequences `members`; `parent` is an index of the list, or None."""
    members: list[int]
    start: int              # depth of its first token
    end: int                # depth after its last token
    parent: int | None


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens two sequences share."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:        # compared in C: most pairs agree for long
        return length
    low, high = 0, length               # a[:low] == b[:low], a[:high] != b[:high]
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def prefix_tree(sequences: Sequence[Sequence[int]], shortest: int = SHORTEST) -> list[Segment]:
    """The segments of the tree, parents before children. Each token of each sequence lies in one segment of its path.

    A run before a branch that is shorter than `shortest` is no segment: it is repeated in every branch.
    """
    segments: list[Segment] = []
    order = sorted(range(len(sequences)), key=lambda i: sequences[i])
    waiting = [(order, 0, None)] if order else []       # (sequences in order that agree up to here, depth, parent)
    while waiting:
        members, start, parent = waiting.pop()
        first, last = sequences[members[0]], sequences[members[-1]]
        end = common_prefix(first, last)                # in order, the first and the last differ most
        if end - start >= shortest or end == len(last):
            segments.append(Segment(members, start, end, parent))
            members = [m for m in members if len(sequences[m]) > end]
            start, parent = end, len(segments) - 1
        branches: dict[int | None, list[int]] = {}
        for m in members:
            token = sequences[m][end] if len(sequences[m]) > end else None
            branches.setdefault(token, []).append(m)
        waiting += [(branch, start, parent) for branch in branches.values()]
    return segments


def cut_long(segments: list[Segment], longest: int) -> list[Segment]:
    """The same tree with each segment that is no root in pieces of up to `longest` tokens, one below the other."""
    cut: list[Segment] = []
    last = []               # the index in `cut` of each segment's last piece
    for segment in segments:
        parent, step = None, segment.end - segment.start
        if segment.parent is not None:
            parent, step = last[segment.parent], longest
        for start in range(segment.start, segment.end, step):
            cut.append(Segment(segment.members, start, min(start + step, segment.end), parent))
            parent = len(cut) - 1
        last.append(parent)
    return cut


def pack(sequences: Sequence[Sequence[int]], token_budget: int) -> list[list[int]]:
    """Indices of the sequences, in parts whose trees have up to token_budget tokens; a longer sequence goes alone."""
    parts: list[list[int]] = []
    room = 0
    for i in sorted(range(len(sequences)), key=lambda i: sequences[i]):      # what shares a prefix are neighbours
        new = len(sequences[i])
        if parts:
            new -= common_prefix(sequences[parts[-1][-1]], sequences[i])
        if parts and new <= room:
            parts[-1].append(i)
            room -= new
        else:
            parts.append([i])
            room = token_budget - len(sequences[i])
    return parts


# ------------------------------------------------------------------------------------------------------ as tensors
@dataclass
class Tree:
    """A micro-batch of B sequences of at most T tokens as one row of N tokens: S segments end to end."""
    ids: torch.Tensor               # (N,)
    depths: torch.Tensor            # (N,) positions in the sequences
    previous: torch.Tensor          # (N,) where in the row the token before this one stands (itself at a root)
    place: torch.Tensor             # (B, T) where in the row a sequence's token stands, 0 for padding
    lengths: list[int]              # (S) of the segments
    paths: list[list[int]]          # (S) a segment's ancestors and itself, root first
    masks: list[torch.Tensor | None]    # (S) what a segment attends to: (length, depth at its end), bool; None: a root
    sequences: list[list[int]]

    def __getitem__(self, rows: slice) -> "Tree":
        """The tree of some of the sequences."""
        return make_tree(self.sequences[rows], self.ids.device, self.place.shape[1])


def make_tree(sequences: list[list[int]], device, width: int, shortest=SHORTEST, longest=LONGEST) -> Tree:
    """The tree of the sequences. width: T. shortest, longest: of a segment that is no root."""
    segments = cut_long(prefix_tree(sequences, shortest), longest)
    place = torch.zeros(len(sequences), width, dtype=torch.long)
    ids, depths, previous, paths, masks, ends = [], [], [], [], [], []
    for i, segment in enumerate(segments):
        begin, length = len(ids), segment.end - segment.start
        ids += sequences[segment.members[0]][segment.start:segment.end]
        depths += range(segment.start, segment.end)
        before = begin if segment.parent is None else ends[segment.parent]
        previous += [before, *range(begin, begin + length - 1)]
        ends.append(len(ids) - 1)
        paths.append(([] if segment.parent is None else paths[segment.parent]) + [i])
        place[segment.members, segment.start:segment.end] = torch.arange(begin, begin + length)
        keys, queries = torch.arange(segment.end), torch.arange(segment.start, segment.end)
        masks.append((keys <= queries[:, None]).to(device) if segment.parent is not None else None)
    tensors = [torch.tensor(column, dtype=torch.long, device=device) for column in (ids, depths, previous)]
    lengths = [segment.end - segment.start for segment in segments]
    return Tree(*tensors, place.to(device), lengths, paths, masks, sequences)


def attend(module, query, key, value, attention_mask, scaling=None, tree=None, **_):
    """transformers' attention interface: (1, H, N, D), (1, Hkv, N, D) twice -> (1, N, H, D).

    Key heads stand where a batch would, and the G query heads that share one see it `expand`ed: nothing is copied.
    """
    kv_heads = key.shape[1]
    queries = query[0].unflatten(0, (kv_heads, -1)).split(tree.lengths, dim=2)          # S x (Hkv, G, L, D)
    keys, values = key[0].split(tree.lengths, dim=1), value[0].split(tree.lengths, dim=1)   # S x (Hkv, L, D)
    mixed = []
    for rows, path, mask in zip(queries, tree.paths, tree.masks):
        known = [torch.cat([parts[i] for i in path], dim=1)[:, None].expand(-1, rows.shape[1], -1, -1)
                 for parts in (keys, values)]                                           # 2 x (Hkv, G, depth, D)
        out = scaled_dot_product_attention(rows, *known, attn_mask=mask, is_causal=mask is None, scale=scaling)
        mixed.append(out.flatten(0, 1).transpose(0, 1))                                 # (L, H, D)
    return torch.cat(mixed)[None], None


AttentionInterface.register("prefix_tree", attend)


def tree_logps(model, tree: Tree, mask: torch.Tensor, temperature: float):
    """As grpo.token_logps: (log-probs, entropies) of the sampled tokens, both (B, T), fp32, 0 outside of mask.

    The model has to attend with `attend` (see engine.attention), in the backward pass too: activation checkpointing
    computes the blocks again there.
    """
    causal = model.get_base_model()                     # the adapter lies in its layers
    hidden = causal.base_model(input_ids=tree.ids[None], position_ids=tree.depths[None], use_cache=False,
                               tree=tree).last_hidden_state[0]                          # (N, H)
    nodes, which = tree.place[mask].unique(return_inverse=True)     # (M,) tokens sampled by anyone; (n,) of the mask
    states = hidden[tree.previous[nodes]]                                               # (M, H)
    logp, entropy = head_logps(causal, states, tree.ids[nodes], temperature)            # (M,), (M,)
    zeros = logp.new_zeros(mask.shape)                                                  # (B, T)
    return (zeros.masked_scatter(mask, logp.index_select(0, which)),
            zeros.masked_scatter(mask, entropy.index_select(0, which)))
