"""Ask a trained policy a question, and watch it answer.

    python ask.py --ckpt out/ "What is the population of the twin town of Kavodu?"
    python ask.py --ckpt out/ --file shop.csv "What is the total price in shop.csv?"
    python ask.py --ckpt out/                      # without a question: one per line, until Ctrl-D

One question is one trajectory of `rollout`, the very one that training and evaluation use. Each turn is printed when
its code has run: thought and code, then the observation and the seconds. The answer comes last; with --quiet it is all
that stdout gets. Exit status: 0; 1 where a question got no answer; 2 for bad input. Read in this order: ask, command.
"""
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from eval_gaia import INHERITED, training_run
from executor import Executor
from machinery.cli import OneLineParser, UserError, exit_status
from machinery.versions import warn_of_other_versions
from policy import Policy, load_policy
from rollout import Sampling, Turn, rollout
from tasks import BUILTIN_TOOLS, Task
from tools import Tool, load_tools

WHY = {"turn_limit": "it used all its turns", "context_limit": "its context is full",
       "length": "a turn was longer than the limit", "error": "the host failed"}


@dataclass
class Asked:
    """What every question of a process shares."""
    policy: Policy
    tools: list[Tool]
    sampling: Sampling
    executor: Executor
    files: dict[str, Path]
    seed: int
    quiet: bool

    def show(self, text: str):
        if not self.quiet:
            print(shown(text), flush=True)


def shown(text: str) -> str:
    """Text of a model, of its code or of a page, without controls: they could rewrite the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def ask(asked: Asked, question: str) -> str | None:
    """The answer to one question, printed turn by turn; None without one."""
    complete = []

    def on_turn(turn: Turn):
        complete.append(turn)
        asked.show(f"{turn.text.strip()}\nObservation ({turn.seconds:.1f} s): {turn.observation.strip()}\n")
    task = Task("asked", question, "", asked.files)
    groups = rollout(asked.policy, [task], asked.executor, asked.tools, asked.sampling, 1, asked.seed, on_turn=on_turn)
    trajectory = groups[0][0]
    for turn in trajectory.turns[len(complete):]:       # a limit stopped it, so it has no observation
        asked.show(turn.text.strip())
    if not trajectory.turns and trajectory.stop_reason == "context_limit":
        raise UserError(f"the question makes a prompt of {trajectory.prompt_length} tokens, and the context holds "
                        f"{asked.sampling.context_tokens}: ask a shorter one, or attach the text with --file")
    if trajectory.answer is None:
        why = WHY.get(trajectory.stop_reason, trajectory.stop_reason)
        print(f"no answer: {why} {trajectory.error}".strip(), file=sys.stderr)
    else:
        print(("" if asked.quiet else "answer: ") + shown(trajectory.answer), flush=True)
    return trajectory.answer


def attached(files: list[Path]) -> dict[str, Path]:
    """Name in the working directory -> file of the host."""
    for file in files:
        if not file.is_file():
            raise UserError(f"--file {file}: no such file")
    names = {file.name: file for file in files}
    if len(names) < len(files):
        raise UserError("--file: two files have one name; rename one of them")
    return names


def questions(given: str | None) -> Iterable[str]:
    """The one on the command line, or those on stdin, one per line."""
    if given is not None:
        yield given
        return
    if sys.stdin.isatty():
        print("one question per line; Ctrl-D ends", file=sys.stderr)
    for line in sys.stdin:
        if line.strip():
            yield line.strip()


def parse_args(argv=None):
    p = OneLineParser(prog="ask.py", allow_abbrev=False, description="Ask a policy questions.")
    p.add_argument("question", nargs="?", help="default: one per line from stdin")
    p.add_argument("--ckpt", type=Path, help="folder with the adapter that train.py wrote")
    p.add_argument("--model", help="the base model; without --ckpt it answers untrained")
    p.add_argument("--file", type=Path, action="append", default=[], help="attach a file; can be repeated")
    p.add_argument("--tools", help="web, my_tools.py or both with a comma; default: as in training")
    p.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0 is greedy")
    p.add_argument("--seed", type=int, default=0, help="of sampling")
    p.add_argument("--sandbox", default="auto", choices=["auto", "bwrap", "none"])
    p.add_argument("--quiet", action="store_true", help="print the answer alone")
    args = p.parse_args(argv)
    if not 0 <= args.temperature < math.inf:
        raise UserError(f"--temperature {args.temperature}: it must be 0 or more")
    if args.question is None and (sys.stdin is None or sys.stdin.closed):
        raise UserError("stdin is closed: give a question on the command line")
    return args


def command(args) -> int:
    """The whole command line; returns how many questions got no answer."""
    warn_of_other_versions()
    run, files = training_run(args.ckpt), attached(args.file)
    loaded = load_tools(args.tools or run["tools"])
    policy = load_policy(args.model or run["model"] or "tiny", run["quantize"] or "auto", args.ckpt)
    known = run["sampling"] or policy.preset.settings
    sampling = Sampling(**{name: known[name] for name in INHERITED if name in known}, temperature=args.temperature)
    builtin = BUILTIN_TOOLS if policy.preset.prompt == "short" or not loaded else []      # as training has them
    tools = load_tools(None, beside=builtin + loaded)
    with Executor(args.sandbox) as executor:
        asked = Asked(policy, tools, sampling, executor, files, args.seed, args.quiet)
        return sum(ask(asked, question) is None for question in questions(args.question))


def main(argv=None) -> int:
    missing = []
    return exit_status(lambda: missing.append(command(parse_args(argv)))) or int(sum(missing) > 0)


if __name__ == "__main__":
    sys.exit(main())
