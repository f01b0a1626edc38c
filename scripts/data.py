"""Makes a train.jsonl of published agent data, and says what it shares with the benchmark.

    python -m scripts.data MAT.json --files mat_files/ --gaia-dir GAIA --remove-overlap --out train.jsonl
    python -m scripts.data train.jsonl --gaia-dir GAIA --remove-overlap --out clean.jsonl      # any training data

Owns `read_mat` (question-answer pairs from MAT / MM-Traj, Gao et al. 2024, arXiv 2412.15606) and `overlap` (with
GAIA). Read in this order: `pair_of`, `read_mat`, `overlap`, `make_training_file`.

MAT holds tasks, each with the trajectory of an agent. Tool-R1 takes about 1,300 questions and answers of it. We do not
know how the paper chose them: the filters here are ours, and each counts what it drops. Before you publish a GAIA
figure: the generator of MAT was prompted with questions of GAIA's validation set.
"""
import sys

if __package__ != "scripts":
    print("error: start this from the repository's folder as: python -m scripts.data", file=sys.stderr)
    sys.exit(2)

import ast
import json
import os
import random
import re
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

from tasks import CONTROL, Task, read_gaia, read_jsonl, read_rows, text_of
from machinery.cli import OneLineParser, UserError, exit_status
from machinery.text import clean, ngrams

VOLATILE = re.compile(
    r"\b(?:current(?:ly)?|today|tonight|now|latest|recent(?:ly)?|upcoming|tomorrow|yesterday|so far|real[- ]time|"
    r"(?:this|last|next) (?:year|month|week|season)|weather|stock price|exchange rate)\b", re.IGNORECASE)
ATTACHED = re.compile(r"^(?:attachments?|attached files?|files?|images?)\s*:\s*(.+)$", re.I | re.M)
LONGEST_ANSWER = 60                              # characters; longer ones are hard to judge
MAT_PAIRS = 1300                                 # the paper's number


# -------------------------------------------------------------------------------------------------------- MAT
class Dropped(Exception):
    """Raised for a record that gives no training pair. Its text is the reason, under which the record is counted."""


def messages_of(record: dict) -> list[tuple[str, str]]:
    """(role, text) of each message, for both common forms of a conversation; role: agent, user or system."""
    roles = {"assistant": "agent", "gpt": "agent", "user": "user", "human": "user", "system": "system"}
    messages = []
    for message in record.get("conversations") or record.get("messages") or []:
        role = roles.get(message.get("role") or message.get("from"), "user")
        messages.append((role, str(message.get("content") or message.get("value") or "")))
    return messages


def answer_of(record: dict, messages: list[tuple[str, str]]) -> str:
    """The record's field for the answer; without one, the constant in the agent's last final_answer(...)."""
    for key in ("answer", "final_answer", "Final answer"):
        if record.get(key) is not None:
            return text_of(record, key).strip()
    calls = re.findall(r"final_answer\((.*)\)", "\n".join(text for role, text in messages if role == "agent"))
    if not calls:
        raise Dropped("no answer")
    try:
        value = ast.literal_eval(re.sub(r"^\s*answer\s*=", "", calls[-1]).strip())
    except (ValueError, SyntaxError) as error:
        raise Dropped("answer is not a constant") from error
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value).strip()


def files_of(record: dict, question: str, folder: Path) -> dict[str, Path]:
    """name -> file, for the record's images and for what its question attaches. Dropped if one is missing."""
    listed = record.get("files") or record.get("image") or []       # one name, a list, or a dict of names
    names = [listed] if isinstance(listed, str) else list(listed.values() if isinstance(listed, dict) else listed)
    for line in ATTACHED.findall(question):
        names += [part.strip() for part in re.split("[,;]", line) if part.strip()]
    files = {}
    for name in dict.fromkeys(names):
        found = [p for p in (folder / name, folder / Path(name).name)
                 if p.is_file() and p.resolve().is_relative_to(folder.resolve())]
        if not found:
            raise Dropped("file missing")
        if files.setdefault(found[0].name, found[0]) != found[0]:
            raise Dropped("two files with one name")
    return files


def pair_of(record: dict, folder: Path) -> Task:
    """The training task in one record. Raises Dropped with the reason if there is none."""
    messages = messages_of(record)
    user = [text for role, text in messages if role == "user"]     # the question, then what the agent observed
    asked = record.get("question") or next(iter(user), "")
    asked = re.sub(r"<image[\w ]*>(?:</image>)?", "", asked)
    question = ATTACHED.sub("", re.split(r"\bTask:\s*", asked)[-1]).strip()
    if not 15 <= len(question) <= 2000:
        raise Dropped("no question")
    answer = answer_of(record, messages)
    if not answer or len(answer) > LONGEST_ANSWER or "\n" in answer:
        raise Dropped("answer not short")
    if VOLATILE.search(question):
        raise Dropped("time-volatile")
    whole = rf"(?<!\w)(?<!\d[.,]){re.escape(clean(answer))}(?!\w|[.,]\d)"    # 13 and 3.5 hold no 3
    if messages and not re.search(whole, clean(" ".join(user[1:]))):
        raise Dropped("answer not verified")    # the agent observed it nowhere: perhaps it is made up
    files = files_of(record, asked, folder)
    return Task(str(record.get("id") or record.get("task_id") or ""), question, answer, files, "1", "mat")


def read_mat(file: Path, folder: Path) -> tuple[list[Task], Counter]:
    """(tasks, dropped records per reason) of a MAT / MM-Traj file: a JSON list, or one record per line."""
    tasks, dropped, seen, ids = [], Counter(), set(), Counter()
    for number, (_, record) in enumerate(read_rows(file)):
        try:
            if not isinstance(record, dict):
                raise Dropped("no record")
            task = pair_of(record, folder)
            if CONTROL.search(task.id):
                raise Dropped("unprintable id")
            if (key := tuple(re.findall(r"\w+", clean(task.question)))) in seen:
                raise Dropped("duplicate")
        except (Dropped, UserError, OSError, AttributeError, TypeError, ValueError) as reason:
            dropped[str(reason) if isinstance(reason, Dropped) else "malformed"] += 1
            continue
        seen.add(key)
        name = task.id or f"mat-{number}"
        ids[name] += 1
        tasks.append(replace(task, id=name if ids[name] == 1 else f"{name}-{number}"))
    return tasks, dropped


# ------------------------------------------------------------------------------------------ overlap with GAIA
def entities(text: str) -> set[str]:
    """Names and numbers: capitalised words that do not begin a sentence, and words with a digit."""
    names = re.findall(r"(?<![.?!:] )(?<!^)\b[A-Z][\w'-]+", text)
    return {w.lower() for w in names} | set(re.findall(r"\b\w*\d\w*\b", text.lower()))


def overlap(tasks: list[Task], exam: list[Task]) -> dict[str, list[str]]:
    """task id -> why it may reveal a question of `exam`: an 8-gram, almost the same names, or answer and a name."""
    exam_grams = {gram: e.id for e in exam for gram in ngrams(e.question)}
    known = [(e.id, entities(e.question), clean(e.answer)) for e in exam]
    flagged: dict[str, list[str]] = {}
    for task in tasks:
        reasons = {f"8-gram of {exam_grams[g]}" for g in ngrams(task.question) if g in exam_grams}
        mine, answer = entities(task.question), clean(task.answer)
        for exam_id, theirs, exam_answer in known:
            shared = mine & theirs
            if len(shared) >= 3 and len(shared) >= 0.5 * len(mine | theirs):
                reasons.add(f"entities of {exam_id}")
            if shared and answer == exam_answer and len(answer) > 3 and answer not in ("true", "false", "none"):
                reasons.add(f"answer and an entity of {exam_id}")
        if reasons:
            flagged[task.id] = sorted(reasons)
    return flagged


# ------------------------------------------------------------------------------------------------ the command
def make_training_file(args) -> None:
    """Read, check, choose, write; print what was dropped and why."""
    if args.out.exists():
        raise UserError(f"--out {args.out} exists already, and nothing is overwritten")
    if args.remove_overlap and not args.gaia_dir:
        raise UserError("--remove-overlap needs --gaia-dir")
    first = next((record for _, record in read_rows(args.data)), None)
    if args.data.suffix == ".jsonl" and isinstance(first, dict) and {"id", "question", "answer"} <= first.keys():
        tasks, dropped, n = read_jsonl(args.data, allow_outside=True), Counter(), args.n or 0
    else:
        tasks, dropped = read_mat(args.data, args.files or args.data.parent)
        n = MAT_PAIRS if args.n is None else args.n
    records = len(tasks) + dropped.total()
    flagged = overlap(tasks, read_gaia(args.gaia_dir)) if args.gaia_dir else {}
    if args.remove_overlap:
        dropped["overlap with GAIA"] = len(flagged)
        tasks = [t for t in tasks if t.id not in flagged]
    if len(tasks) > n > 0:
        dropped["beyond --n"] = len(tasks) - n
        tasks = random.Random(args.seed).sample(tasks, n)
    if not tasks:
        raise UserError(f"{args.data}: nothing is left of {records} records: {dict(dropped)}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w") as out:
        for task in tasks:
            files = [os.path.relpath(file, args.out.resolve().parent) for file in task.files.values()]
            out.write(json.dumps(asdict(replace(task, files=files))) + "\n")
    report = {"source": str(args.data), "seed": args.seed, "read": records, "kept": len(tasks),
              "dropped": dropped, "flagged": flagged, "ids": [t.id for t in tasks]}
    Path(f"{args.out}.report.json").write_text(json.dumps(report, indent=1))
    print(f"{records} records read, {len(tasks)} kept -> {args.out}")
    for reason, count in dropped.most_common():
        print(f"  dropped {count:6d}  {reason}")
    shared = f"{len(flagged)} share something with GAIA" if args.gaia_dir else "not checked against GAIA"
    print(f"  {shared}{', removed' if args.remove_overlap else ''}; ids and reasons in {args.out}.report.json")


def main(argv=None) -> int:
    p = OneLineParser(prog="-m scripts.data", allow_abbrev=False, description="Make a train.jsonl of agent data.")
    p.add_argument("data", type=Path, help="a JSON file of MAT / MM-Traj, or a train.jsonl to be checked")
    p.add_argument("--files", type=Path, help="folder with MAT's images and files; default: where the JSON is")
    p.add_argument("--out", type=Path, default=Path("train.jsonl"))
    p.add_argument("--n", type=int, help=f"at most N tasks, by --seed; 0: all; default: {MAT_PAIRS} of MAT, else all")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--gaia-dir", help="check against this copy of GAIA's validation split")
    p.add_argument("--remove-overlap", action="store_true", help="leave out what the check flags")
    return exit_status(lambda: make_training_file(p.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
