"""The dynamic sample queue: good groups are kept and used again in later updates.

Read in this order: `SampleQueue.admit` (what enters), `priority` (what is drawn, and what is thrown out first),
`draw`, `drop_stale`.

1. **The rule is ours.** Tool-R1 (arXiv 2509.12867) keeps high-quality trajectories in a queue and replays them, but
   its exact rule is not known to us. Ours: whole groups, each with the advantages of its own group (an advantage
   means nothing outside its group); priority = spread * 2^(-age / half_life) / (1 + uses). With --replay positive a
   group enters without the trajectories that were not better than its mean.
   The paper says that the queue saves costly online samples. Shown here, for the tiny model from a start that is nearly
   always wrong, by the arm queue-positive of scripts/study_queue.py: 0.66 of the samples of the best control without a
   queue (see MEASUREMENTS.md). Not shown: with a real model; from a start that is often right; with the settings of
   the tiny model and of large ones, where the queue only fills the places of groups without signal.

2. **The name.** The project's fixed list of files calls this one `queue.py`, which hides the standard library's
   `queue` from every `import queue` of a process started in this folder, torch's and requests' included. So this
   module is a *superset*: it loads the standard module and re-exports its names, the very same objects
   (`queue.Full` stays one class, also when pickled). Where the standard module was imported first (pytest, notebooks,
   debuggers, some spawned workers), Python never looks for this file; machinery/sample_queue.py then runs it, and the
   last lines below hand `SampleQueue` to the standard module. Either way `from queue import SampleQueue` works
   afterwards. Hence: nothing but the standard library may be imported here.
"""
import sys
import sysconfig
from collections import Counter, deque
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from typing import Any


def _standard_queue():
    """The standard library's `queue`: the one already imported, else loaded from the standard library's folder."""
    loaded = sys.modules.get("queue")
    if loaded is not None and vars(loaded) is not globals():
        return loaded
    spec = PathFinder.find_spec("queue", [sysconfig.get_path("stdlib")])
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_standard = _standard_queue()
globals().update({name: value for name, value in vars(_standard).items() if not name.startswith("__")})
__all__ = [*_standard.__all__, "SampleQueue", "Entry"]


@dataclass
class Entry:
    """One group in the queue."""
    group: Any        # opaque here; train.py stores a Group: trajectories with their behaviour log-probs, advantages
    spread: float     # standard deviation of the group's rewards: how much there is to learn from it
    step: int         # step of the training loop at which it was sampled
    order: int        # admission number: breaks ties (a sort of (score, group) pairs would compare groups)
    uses: int = 1     # updates it took part in; the first one is the update right after it was sampled


class SampleQueue:
    """A deque of groups with priorities. Ages are counted in steps of the training loop.

    capacity: groups kept; half_life: steps in which a priority halves; max_age: steps after which a group is
    dropped; max_uses: updates a group may take part in; max_off_policy: a group is dropped once more than this
    share of its tokens is off-policy (|l_old - l_behaviour| > log(1 + eps_high)): the mean of its trajectories'
    shares, where an overlong one counts 0.
    """

    def __init__(self, capacity: int, half_life: float, max_age: int, max_uses: int, max_off_policy: float):
        self.capacity, self.half_life = capacity, half_life
        self.max_age, self.max_uses, self.max_off_policy = max_age, max_uses, max_off_policy
        self.entries: deque[Entry] = deque()
        self.counts = Counter(admitted=0, evicted=0, too_old=0, used_up=0, off_policy=0)

    def __len__(self):
        return len(self.entries)

    def priority(self, entry: Entry, step: int) -> float:
        """spread * 2^(-age / half_life) / (1 + uses): informative, recent and little used comes first."""
        return entry.spread * 2.0 ** (-(step - entry.step) / self.half_life) / (1 + entry.uses)

    def admit(self, group, spread: float, any_right: bool, step: int) -> bool:
        """Take a group in after its first use, if it is informative and holds a right answer; True if it stayed."""
        if spread <= 0 or not any_right:
            return False
        entry = Entry(group, spread, step, order=self.counts["admitted"])
        self.entries.append(entry)
        self.counts["admitted"] += 1
        if len(self.entries) <= self.capacity:
            return True
        worst = min(self.entries, key=lambda e: (self.priority(e, step), e.order))    # on a tie the oldest goes
        self._remove(worst, "evicted")
        return worst is not entry

    def draw(self, count: int, step: int, rng) -> list[Entry]:
        """Draw up to `count` different groups, in proportion to priority. They stay in the queue, with one use more.

        The `count` largest u^(1 / priority), u uniform, are such a draw (Efraimidis and Spirakis 2006).
        rng: random.Random.
        """
        self.drop_stale(step)
        keys = {}
        for entry in self.entries:
            u = rng.random()
            keys[entry.order] = (u ** (1.0 / self.priority(entry, step)), entry.order)      # the order decides ties
        ranked = sorted(self.entries, key=lambda entry: keys[entry.order], reverse=True)
        drawn = ranked[:max(count, 0)]
        for entry in drawn:
            entry.uses += 1
        return drawn

    def drop_stale(self, step: int):
        """Drop what is too old at `step` or used up."""
        for entry in list(self.entries):
            if step - entry.step > self.max_age:
                self._remove(entry, "too_old")
            elif entry.uses >= self.max_uses:
                self._remove(entry, "used_up")

    def report_off_policy(self, entry: Entry, share: float):
        """The update measured `share` off-policy tokens in this replayed group: drop it if that is too many."""
        if share > self.max_off_policy:
            self._remove(entry, "off_policy")

    def _remove(self, entry: Entry, reason: str):
        self.entries = deque(e for e in self.entries if e is not entry)
        self.counts[reason] += 1

    def stats(self, step: int) -> dict:
        """Size, mean age in steps, mean uses, and the running counts, for the log."""
        n = max(len(self), 1)
        found = {
            "queue_size": len(self),
            "queue_age": sum(step - entry.step for entry in self.entries) / n,
            "queue_uses": sum(entry.uses for entry in self.entries) / n,
        }
        for name, count in self.counts.items():
            found[f"queue_{name}"] = count
        return found

    def state_dict(self) -> dict:
        """Everything but the settings. `entries` holds the groups themselves, which the caller knows how to store."""
        return {"entries": [dict(vars(entry)) for entry in self.entries], "counts": dict(self.counts)}

    def load_state_dict(self, state: dict):
        self.entries = deque(Entry(**values) for values in state["entries"])
        self.counts = Counter(state["counts"])


if sys.modules.get("queue") is _standard:    # the standard module came first: make it the superset (see the docstring)
    _standard.SampleQueue, _standard.Entry = SampleQueue, Entry
