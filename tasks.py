"""Tasks: questions with exact answers, built in or read from files.

Owns `Task`, the built-in task families with their offline world and its three tools, and the files that hold
tasks. Knows nothing of prompts, models or rewards.

Reading order: Task -> the world (`fact`, the tools) -> Question, Parts and the families -> builtin_tasks -> files.

The world is a made-up atlas. Every fact is computed from the name of its entity (by a hash); nothing is stored. The
hash also puts every name and number on one of two sides: training tasks use one, held-out tasks the other. What the
atlas says of an entity lies on the same side as its name. So the splits share neither entities nor values.

Families: the built-in tiny model can learn CORE. HARD is mostly beyond it. Both are trained on and reported.
Difficulty: 0 is for the tiny model (one to three turns), 1 to 3 for models that can read. Each unit puts one more
"the twin town of" before every town, and adds terms to sums, 30 rows and two columns to tables. From 1 on, tables
are asked with a condition; from 2 on, they have empty cells.

Departure from the paper, which trains on MAT only: these tasks let the method run without network or key.
"""
import hashlib
import json
import math
import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path

from machinery.cli import UserError
from machinery.folder import reading
from tools import ToolError, tool

HUB = "https://huggingface.co/datasets/gaia-benchmark/GAIA"
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")      # and halves of surrogate pairs: no terminal shows them
HIDDEN = "?"                # stands for an answer that is not public: those of GAIA's test split


@dataclass(frozen=True)
class Task:
    """One question. `files` maps a name in the working directory to a file of the host, or to its content."""
    id: str
    question: str
    answer: str
    files: Mapping[str, Path | bytes] = field(default_factory=dict)
    level: str = "1"        # the turns that a direct solution takes: "1", "2" or "3", like GAIA's levels
    family: str = ""


# -------------------------------------------------------------------------------------------------- the world
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
SYLLABLE = "(?:[bdfgklmnprstvz][aeiou])"
TOWN = re.compile(rf"(?=[A-Z])(?i:{SYLLABLE}){SYLLABLE}{{2}}")                                    # Kavodu
PERSON = re.compile(rf"(?=[A-Z])(?i:{SYLLABLE}){SYLLABLE} (?=[A-Z])(?i:{SYLLABLE}){SYLLABLE}")    # Mira Kobe
FIELDS = {"population": (1_000, 999_999), "area": (10, 9_999), "elevation": (10, 2_999), "rainfall": (100, 2_999)}
RANGES = FIELDS | {"tower": (20, 399), "born": (1920, 1999)}      # of the facts that are numbers
UNITS = {"m": ("length", 1.0), "ft": ("length", 0.3048), "yd": ("length", 0.9144), "km": ("length", 1000.0),
         "kg": ("mass", 1.0), "lb": ("mass", 0.45359237), "oz": ("mass", 0.45359237 / 16), "g": ("mass", 0.001)}
COLUMNS = ("price", "stock", "weight", "size", "age", "rank", "score", "volume")
SPLITS = ("train", "heldout")


def digest(*values) -> int:
    return int.from_bytes(hashlib.sha256("|".join(map(str, values)).encode()).digest()[:8], "big")


def side(value) -> int:
    """0 or 1: whether a name or number belongs to training or to the held-out tasks."""
    return digest("side", value) % 2


def on_side(wanted: int, rng: random.Random, make: Callable):
    """The first value of make(rng) that lies on the side `wanted`."""
    while side(value := make(rng)) != wanted:
        pass
    return value


def word(rng: random.Random, syllables: int = 3) -> str:
    return "".join(rng.choices(SYLLABLES, k=syllables)).capitalize()


def fact(name: str, field: str):
    """What the atlas holds. ToolError for a name or field that it does not have."""
    is_town = TOWN.fullmatch(name)
    if not (is_town or PERSON.fullmatch(name)):
        raise ToolError(f"no entry {name!r}")
    rng, its_side = random.Random(digest("atlas", name, field)), side(name)
    if field == "mayor" and is_town:        # not among the fields: only `search` knows mayors
        return on_side(its_side, rng, lambda rng: f"{word(rng, 2)} {word(rng, 2)}")
    fields = (*FIELDS, "tower", "twin") if is_town else ("born", "home")
    if field not in fields:
        raise ToolError(f"{name} has no {field!r}; fields: {', '.join(fields)}")
    if field in ("twin", "home"):
        return on_side(its_side, rng, word)
    low, high = RANGES[field]
    number = on_side(its_side, rng, lambda rng: rng.randint(low, high))
    return [number, rng.choice(("m", "ft", "yd"))] if field == "tower" else number


@tool
def lookup(name: str, field: str) -> int | str | list:
    """One fact of the atlas. A town has population, area, elevation, rainfall, twin (its twin town's name)
    and tower (its height, as [number, unit]). A person, in full, has born (a year) and home (a town)."""
    if field == "mayor":
        raise ToolError("the atlas does not know mayors; search for them")
    return fact(name, field)


@tool
def search(query: str) -> str:
    """A sentence from the newspapers. They know who is the mayor of a town: search("mayor of Kavodu")."""
    if "mayor" not in query or not (town := re.search(rf"\b{TOWN.pattern}\b", query)):
        return "Nothing found."
    return f"{fact(town[0], 'mayor')} is the mayor of {town[0]}."


@tool
def convert(value: float, source: str, target: str) -> float:
    """A value in the source unit converted to the target unit, rounded to 2 decimals.
    Units: m, ft, yd, km, kg, lb, oz, g."""
    if source not in UNITS or target not in UNITS:
        raise ToolError(f"unknown unit; units: {', '.join(UNITS)}")
    (kind, factor), (target_kind, target_factor) = UNITS[source], UNITS[target]
    if kind != target_kind:
        raise ToolError(f"{source} is a {kind}, {target} is a {target_kind}")
    return round(value * factor / target_factor, 2)


BUILTIN_TOOLS = [lookup, search, convert]


# ----------------------------------------------------------------------------------------------- the families
@dataclass
class Question:
    """A task without its id, and the `slots` that its text was made of (scripts/warm_start.py: DEMOS uses them)."""
    text: str
    answer: object
    level: int
    slots: dict
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Town:
    phrase: str         # as the question puts it: "the twin town of Kavodu"
    start: str          # the name in the phrase: Kavodu
    name: str           # of the town that the phrase means


@dataclass
class Parts:
    """Picks what a question is made of, all from one side of the world."""
    rng: random.Random
    side: int
    difficulty: int

    def number(self, low: int, high: int) -> int:
        return on_side(self.side, self.rng, lambda rng: rng.randrange(low, high))

    def town(self, links: int | None = None) -> Town:
        """A town; `links` (by default as many as the difficulty) twin towns lie between start and name."""
        links = self.difficulty if links is None else links
        start = name = on_side(self.side, self.rng, word)
        for _ in range(links):
            name = fact(name, "twin")
        return Town("the twin town of " * links + start, start, name)

    def table(self) -> tuple[str, str, str, list[dict], dict[str, bytes]]:
        """(column asked for, another column, condition, rows that meet it, files). shop.csv has 4 + 30 d items and
        2 + 2 d columns of distinct numbers; at difficulty 0 there is no condition."""
        d, rng, size = self.difficulty, self.rng, 4 + 30 * self.difficulty
        columns = rng.sample(COLUMNS, 2 + 2 * d)
        last = columns[-1]
        numbers = [n for n in range(10, 100 + 900 * d) if side(n) == self.side]
        values = [rng.sample(numbers, size) for _ in columns]
        rows = [{"item": on_side(self.side, rng, word), **dict(zip(columns, row))} for row in zip(*values)]
        for row in rows:
            if d >= 2 and rng.random() >= 0.8:
                row[last] = ""
        lines = [["item", *columns], *(row.values() for row in rows)]
        text = "".join(",".join(map(str, line)) + "\n" for line in lines)
        asked, other = rng.sample(columns[:2], 2)
        condition = ""
        if d > 0:
            bound = rng.randrange(100, 500)
            condition = f" among items whose {last} is above {bound} (empty means 0)"
            rows = [row for row in rows if (row[last] or 0) > bound]
        return asked, other, condition, rows, {"shop.csv": text.encode()}


def ask_lookup(parts: Parts) -> Question:
    field = parts.rng.choice(list(FIELDS))
    towns = [parts.town() for _ in range(1 + parts.difficulty)]
    what = f"the {field} of" if len(towns) == 1 else f"the sum of the {field} of"
    other = {"population": "area", "area": "elevation", "elevation": "rainfall", "rainfall": "population"}[field]
    return Question(f"What is {what} {' and of '.join(town.phrase for town in towns)}?",
                    sum(fact(town.name, field) for town in towns), 1,
                    {"name": towns[0].start, "field": field, "other": other})


def ask_convert(parts: Parts) -> Question:
    kind = parts.rng.choice(("length", "mass"))
    source, target = parts.rng.sample([unit for unit in UNITS if UNITS[unit][0] == kind], 2)
    values = [parts.number(11, 999) for _ in range(1 + 2 * parts.difficulty)]
    text = " plus ".join(f"{value} {source}" for value in values)
    answer = convert.function(sum(values), source, target)
    return Question(f"How many {target} are {text}? Round to 2 decimals.", answer, 1,
                    {"value": values[0], "source": source, "target": target})


def ask_column(parts: Parts) -> Question:
    asked, other, condition, rows, files = parts.table()
    row = max(rows, key=lambda row: row[other]) if condition else parts.rng.choice(rows)
    item = f"the item with the highest {other}" if condition else row["item"]
    return Question(f"What is the {asked} of {item} in shop.csv{condition}?", row[asked], 1,
                    {"name": row["item"], "column": asked, "other": other}, files)


def ask_total(parts: Parts) -> Question:
    asked, other, condition, rows, files = parts.table()
    return Question(f"What is the total {asked} in shop.csv{condition}?", sum(row[asked] for row in rows), 2,
                    {"column": asked, "other": other}, files)


def ask_twin(parts: Parts) -> Question:
    field = parts.rng.choice(list(FIELDS))
    town = parts.town(1 + parts.difficulty)
    answer = fact(town.name, field)
    return Question(f"What is the {field} of {town.phrase}?", answer, 2, {"name": town.start, "field": field})


def ask_tower(parts: Parts) -> Question:
    town = parts.town()
    height, unit = fact(town.name, "tower")
    target = parts.rng.choice([other for other in ("m", "ft", "yd") if other != unit])
    return Question(f"How high is the tower of {town.phrase} in {target}? Round to 2 decimals.",
                    convert.function(height, unit, target), 2, {"name": town.start, "unit": target})


def ask_mayor(parts: Parts) -> Question:
    town = parts.town()
    year = fact(fact(town.name, "mayor"), "born")
    return Question(f"In which year was the mayor of {town.phrase} born?", year, 2, {"name": town.start})


def ask_gap(parts: Parts) -> Question:
    larger, smaller = sorted([parts.town(), parts.town()], key=lambda town: -fact(town.name, "population"))
    gap = fact(larger.name, "population") - fact(smaller.name, "population")
    return Question(f"How many more people live in {larger.phrase} than in {smaller.phrase}?", gap, 3,
                    {"name": larger.start, "second": smaller.start})


def ask_arithmetic(parts: Parts) -> Question:
    low, high = (11, 99) if parts.side == 0 else (1_001, 99_999)    # held out: a range that training never shows
    a, b, *rest = [parts.number(low, high) for _ in range(3 + 2 * parts.difficulty)]
    text = f"{a} * {b} + " + " - ".join(map(str, rest))
    return Question(f"What is {text}?", a * b + rest[0] - sum(rest[1:]), 1, {"a": a, "b": b, "c": rest[0]})


def ask_dates(parts: Parts) -> Question:
    earliest = date(1900, 1, 1) if parts.side == 0 else date(2001, 1, 1)
    days = sorted(parts.rng.sample(range(36_000), 2 + 2 * parts.difficulty))
    dates = [str(earliest + timedelta(days=day)) for day in days]
    text = " plus ".join(f"from {a} to {b}" for a, b in zip(dates[::2], dates[1::2]))
    return Question(f"How many days is it {text}?", sum(days[1::2]) - sum(days[::2]), 1,
                    {"first": dates[0], "second": dates[1]})


def ask_largest(parts: Parts) -> Question:
    towns = [parts.town() for _ in range(3 + parts.difficulty)]
    best = max(range(len(towns)), key=lambda i: fact(towns[i].name, "population"))
    slots = {f"name{i}": town.start for i, town in enumerate(towns)}
    text = ", ".join(town.phrase for town in towns)
    return Question(f"Which has the largest population: {text}? Give the town's own name.", towns[best].name, 2,
                    slots | {"best": best, "worse": (best + 1) % len(towns)})


CORE_FAMILIES = {"lookup": ask_lookup, "convert": ask_convert, "column": ask_column, "total": ask_total,
                 "twin": ask_twin, "tower": ask_tower, "mayor": ask_mayor, "gap": ask_gap}
HARD_FAMILIES = {"arithmetic": ask_arithmetic, "dates": ask_dates, "largest": ask_largest}
CORE, HARD = tuple(CORE_FAMILIES), tuple(HARD_FAMILIES)


def make_question(family: str, split: str, rng: random.Random, difficulty: int = 0) -> Question:
    """One question of a family. `rng` decides what is asked; the answer is what the world says."""
    return (CORE_FAMILIES | HARD_FAMILIES)[family](Parts(rng, SPLITS.index(split), difficulty))


def builtin_tasks(split: str, n: int, seed: int, families: Iterable[str] = CORE + HARD,
                  difficulty: int = 0) -> list[Task]:
    """n tasks, the families in turn; the same arguments give the same tasks. split: "train" or "heldout", which
    share no entity. difficulty: 0 to 3, see the top. UserError for what does not exist."""
    families = tuple(families)
    if not (split in SPLITS and families and {*families} <= {*CORE, *HARD} and difficulty in range(4)):
        raise UserError(f"no built-in tasks: split {split}, families {families}, difficulty {difficulty}")
    tasks = []
    for i in range(n):
        family = families[i % len(families)]
        name = f"{split}-{family}-{i // len(families):04d}"
        q = make_question(family, split, random.Random(f"{seed}-{name}-{difficulty}"), difficulty)
        level = str(min(3, q.level + difficulty))
        tasks.append(Task(name, q.text, str(q.answer), q.files, level, family))
    return tasks


def split_tasks(tasks: list[Task] | None, eval_tasks: int, seed: int, difficulty: int) -> tuple[list[Task], list[Task]]:
    """(training, held-out) tasks. None: the built-in ones, with eval_tasks held-out tasks per family. Of a user's own
    tasks a tenth is held out, at most eval_tasks, chosen by a fixed shuffle."""
    if tasks is None:
        heldout = [task for family in CORE + HARD
                   for task in builtin_tasks("heldout", eval_tasks, 0, (family,), difficulty)]
        return builtin_tasks("train", 3000, seed, difficulty=difficulty), heldout
    if len(tasks) < 2:
        raise UserError(f"--data: {len(tasks)} tasks; at least 2 are needed, one of them held out")
    shuffled = list(tasks)
    random.Random("held out").shuffle(shuffled)
    n = min(eval_tasks, len(shuffled) // 10 or 1)
    return shuffled[n:], shuffled[:n]


def endless(tasks: list[Task], seed: int, first: int, n: int) -> list[Task]:
    """n tasks from number `first` on, of an endless sequence in which every epoch has its own shuffle."""
    epoch, skipped = divmod(first, len(tasks))
    chosen = []
    while len(chosen) < skipped + n:
        order = list(tasks)
        random.Random(f"order-{seed}-{epoch}").shuffle(order)
        chosen += order
        epoch += 1
    return chosen[skipped:skipped + n]


def every(n: int, tasks: list[Task]) -> list[Task]:
    """Of each family the first task and every n-th after it."""
    chosen = []
    for family in dict.fromkeys(task.family for task in tasks):
        chosen += [task for task in tasks if task.family == family][::n]
    return chosen


# ------------------------------------------------------------------------------------------------------ files
def read_rows(file: Path) -> list[tuple[int, dict]]:
    """(number, record) of a file: lines of JSON, a list in JSON, or parquet. UserError if it is malformed."""
    with reading(file):
        if file.suffix == ".parquet":
            import pyarrow.parquet          # in requirements-gaia.txt
            return list(enumerate(pyarrow.parquet.read_table(file).to_pylist(), 1))
        text = file.read_text("utf-8-sig")
        if text.lstrip().startswith("["):
            return list(enumerate(json.loads(text), 1))
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            with reading(f"{file}:{number}"):
                rows.append((number, json.loads(line)))
    return rows


def read_tasks(path: Path, fields: Callable, root: Path | None, complete: bool = True) -> list[Task]:
    """The tasks in a file; `fields` turns a record into one with the names that read_jsonl documents. Attachments must
    lie below `root`, and be there if `complete`. UserError with file and line for what is malformed or duplicate."""
    tasks, lines = [], {}       # lines: the line in which each id stands
    for number, record in read_rows(path):
        if isinstance(record, dict) and record.get("task_id") == "0-0-0-0-0":   # GAIA's own placeholder
            continue
        with reading(f"{path}:{number}"):
            task = parse_task(fields(record), path.parent, root)
            if task.id in lines:
                raise UserError(f"id {task.id!r} is already used in line {lines[task.id]}")
            if complete and (absent := missing_files([task])):
                raise UserError(f"attachment {absent[0]} is missing")
        lines[task.id] = number
        tasks.append(task)
    if not tasks:
        raise UserError(f"{path}: no tasks in it")
    return tasks


def read_jsonl(path: Path | str, allow_outside: bool = False) -> list[Task]:
    """Tasks from lines {"id", "question", "answer", "files", "level"}; files: paths relative to this file, below its
    folder: a file of unknown origin must not put any file of this machine before the model's code."""
    return read_tasks(Path(path), lambda record: record, None if allow_outside else Path(path).parent)


def parse_task(record, folder: Path, root: Path | None) -> Task:
    if not isinstance(record, dict):
        raise UserError(f"a task is a JSON object, not {type(record).__name__}")
    names = record.get("files") or []
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise UserError("'files' is a list of paths relative to this file")
    files = {Path(name).name: attachment(folder, name, root) for name in names}
    if len(files) < len(names):
        raise UserError("two attachments have the same file name")
    given = [key for key in ("level", "family") if record.get(key) not in (None, "")]
    return Task(files=files, **{key: text_of(record, key) for key in ["id", "question", "answer", *given]})


def text_of(record: dict, key: str) -> str:
    """A field of a record as text. UserError unless it is text or a finite number; a name must be printable, too."""
    value = record.get(key)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
    if not (number or isinstance(value, str) and value.strip()):
        raise UserError(f"{key!r} is missing, empty or neither text nor a finite number")
    if key not in ("question", "answer") and CONTROL.search(str(value)):
        raise UserError(f"{key!r} has a control character")
    return str(value)


def attachment(folder: Path, name: str, root: Path | None) -> Path:
    """The file of this name, all links followed. UserError unless it lies below `root`; None: anywhere."""
    with reading(f"attachment {name[:100]!r}"):
        if CONTROL.search(name):
            raise UserError("its name has a control character")
        file = (folder / name).resolve()
        file.exists()                       # raises if the name is too long
        if root and not file.is_relative_to(root.resolve()):
            raise UserError(f"it lies outside of {root}; if you trust whose data this is: --allow-outside-files")
        return file


def missing_files(tasks: list[Task]) -> list[Path]:
    """The attachments that are not there."""
    return [file for task in tasks for file in task.files.values() if isinstance(file, Path) and not file.is_file()]


def read_gaia(folder: Path | str, split: str = "validation", allow_outside: bool = False) -> list[Task]:
    """Tasks in GAIA's layout: metadata (jsonl or parquet) in folder[/2023][/<split>], files beside it; these may be
    missing. The test split has no answers: its tasks get the answer HIDDEN. folder "hub": downloaded."""
    root = None if allow_outside else Path(folder)
    if folder == "hub":         # it needs the token of a user who has accepted the dataset's conditions
        from huggingface_hub import snapshot_download
        with reading("GAIA", f"Ask for access at {HUB} (given at once), then `hf auth login` or HF_TOKEN=..."):
            folder = snapshot_download("gaia-benchmark/GAIA", repo_type="dataset")
        root = Path(folder).parent.parent       # its files are links to blobs/, beside snapshots/
    places = [Path(folder) / below / f"metadata.{kind}" for below in (f"2023/{split}", split, ".")
              for kind in ("jsonl", "parquet")]
    if found := [file for file in places if file.is_file()]:
        return read_tasks(found[0], gaia_fields, root, complete=False)
    raise UserError(f"{folder}: no metadata.jsonl or .parquet in it, in 2023/{split} or in {split}")


def gaia_fields(row) -> dict:
    if not isinstance(row, dict) or not {"task_id", "Question", "Level"} <= row.keys():
        raise UserError("no GAIA question: task_id, Question or Level is missing")
    answer, name = row.get("Final answer"), row.get("file_name")
    return {"id": row["task_id"], "question": row["Question"], "level": row["Level"], "family": "gaia",
            "answer": HIDDEN if answer in (None, "") else answer, "files": [name] if name else []}
