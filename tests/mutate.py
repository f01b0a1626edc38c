"""Do the tests notice a mistake? Changes one operator or number of a file at a time and runs the file's own tests.

    python -m tests.mutate                              # 200 mutants over all files below, by the places in each
    python -m tests.mutate --seed 12 queue.py tools.py  # of the same mutants, those of two files

A mutant that no test notices *survives*: it means the same (equivalent), or a test is missing. Texts stay as they are,
and so does the working tree: each mutant runs in a copy. This file holds no test; pytest does not collect it.
"""
import argparse
import ast
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
from collections import defaultdict
from itertools import accumulate
from pathlib import Path

import hypothesis    # noqa: F401  the slow imports of the tests, made once
import peft          # noqa: F401
import pytest
import torch         # noqa: F401
import transformers  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
FILES = ("grpo.py", "queue.py", "reward.py", "rollout.py", "tools.py", "eval_gaia.py", "tasks.py")
PAIRS = [(ast.Eq, ast.NotEq), (ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Is, ast.IsNot), (ast.In, ast.NotIn),
         (ast.And, ast.Or), (ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.USub, ast.UAdd)]
OTHER = {b: a for a, b in PAIRS} | dict(PAIRS) | {
    ast.Pow: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.Mult, ast.BitAnd: ast.BitOr}
NEXT = {bool: lambda x: not x, int: lambda x: x + 1, float: lambda x: 2 * x or 1.0}
SECONDS = 600                            # a mutant that takes longer hangs: killed
BUDGET = 40.0                            # seconds of tests per mutant


def places(tree: ast.AST) -> list[tuple[ast.AST, int]]:
    """What can be changed, in the order of the source: a node, and which of a comparison's operators."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            found += [(node, i) for i in range(len(node.ops))]
        elif isinstance(node, ast.Constant) and type(node.value) in NEXT or type(getattr(node, "op", None)) in OTHER:
            found.append((node, 0))
    return sorted(found, key=lambda place: (place[0].lineno, place[0].col_offset, place[1]))


def mutant(file: str, number: int) -> tuple[str, str]:
    """(its source, what changed)."""
    tree = ast.parse((ROOT / file).read_text())
    node, i = places(tree)[number]
    before = ast.unparse(node)
    if isinstance(node, ast.Compare):
        node.ops[i] = OTHER[type(node.ops[i])]()
    elif isinstance(node, ast.Constant):
        node.value = NEXT[type(node.value)](node.value)
    else:
        node.op = OTHER[type(node.op)]()
    return ast.unparse(tree), f"{file}:{node.lineno}  {before}  ->  {ast.unparse(node)}"


def in_child(copy: Path, options: list[str]) -> None:
    """Run pytest in the copy, with what it prints in copy/printed. The slow imports are already there."""
    os.chdir(copy)
    sys.path[:] = [str(copy), *(path for path in sys.path if Path(path).resolve() != ROOT)]
    sys.stdout = sys.stderr = open("printed", "w")
    status = pytest.main(["-qx", "-p", "no:cacheprovider", *options])
    sys.stdout.flush()              # os._exit does not: the names of the fastest tests would be lost
    os._exit(status)


def run_tests(copy: Path, *options: str, seconds: float | None = SECONDS) -> bool:
    """Whether all tests pass."""
    child = multiprocessing.get_context("fork").Process(target=in_child, args=(copy, options))
    child.start()
    child.join(seconds)
    child.kill()
    return child.exitcode == 0


def fast_first(copy: Path, test: str) -> list[str]:
    """The file's tests, the fast ones first, as many as take BUDGET seconds: whatever they miss counts as survived."""
    if not run_tests(copy, test, "--durations=0", "-vvv", seconds=None):
        raise SystemExit(f"{test} fails without any change")
    seconds = defaultdict(float)
    for time, name in re.findall(rf"^([\d.]+)s \w+ +({test}::\w+)", (copy / "printed").read_text(), re.MULTILINE):
        seconds[name] += float(time)
    fast = sorted(seconds, key=seconds.get)
    return [name for name, total in zip(fast, accumulate(map(seconds.get, fast))) if total <= BUDGET]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", default=FILES, help="only the mutants of these files")
    parser.add_argument("--n", type=int, default=200, help="mutants over all files")
    parser.add_argument("--seed", type=int, default=12)
    args = parser.parse_args()
    everywhere = [(file, k) for file in FILES for k in range(len(places(ast.parse((ROOT / file).read_text()))))]
    chosen = random.Random(args.seed).sample(everywhere, args.n)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "out*", "__pycache__"))
        for file in args.files:
            tests = fast_first(copy, f"tests/test_{file}")
            for number in sorted(k for name, k in chosen if name == file):
                source, what = mutant(file, number)
                (copy / file).write_text(source)
                results.append(not run_tests(copy, *tests))
                print("killed  " if results[-1] else "SURVIVED", what, flush=True)
            shutil.copy(ROOT / file, copy / file)
    print(f"{sum(results)} of {len(results)} killed")


if __name__ == "__main__":
    main()
