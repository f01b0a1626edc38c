"""Tasks: questions with exact answers, built in or read from files.

Owns `Task`, the built-in task families with their offline world and its three tools, and the files that hold
tasks. Knows nothing of prompts, models or rewards.

Reading order: Task -> the world (`fact`, the tools) -> Draw and the families -> builtin_tasks -> files.

The world is a made-up atlas. Every fact is a function of the entity's name alone (a hash): there are as many
entities as names, the store needs no file, and no fact depends on the seed of a run. The hash also puts every
name and number on one of two sides: training tasks are made of one side, held-out tasks of the other. A
town's relations and figures lie on the town's side, so the splits share neither entities nor values, and no
prompt holds an answer.

Families: CORE are learnable by the built-in tiny model. HARD are mostly beyond it (arithmetic and dates in
ranges that training never shows, which of several is largest); they are trained on and reported all the same.

The difficulty dial: 0 is for the tiny model (one to three steps). For models that can read, each notch from 1
to 3 puts a link "the twin town of" before every town, adds terms to sums, 30 rows and two distractor columns
to tables, and tables are asked by condition; from 2 on they have empty cells.

Departure from the paper, which trains on MAT only: these tasks let the method run without network or key.
"""
import csv
import hashlib
import io
import json
import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path

from machinery.cli import UserError
from tools import ToolError, tool


@dataclass(frozen=True)
class Task:
    """One question. `files` maps a name in the working directory to a host file or to its content."""
    id: str
    question: str
    answer: str
    files: Mapping[str, Path | bytes] = field(default_factory=dict)
    level: str = "1"        # the steps a straight solution takes: "1", "2" or "3", as GAIA's levels
    family: str = ""


# -------------------------------------------------------------------------------------------------- the world
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
SYLLABLE = "(?:[bdfgklmnprstvz][aeiou])"
TOWN = re.compile(rf"(?=[A-Z])(?i:{SYLLABLE}){SYLLABLE}{{2}}")                                    # Kavodu
PERSON = re.compile(rf"(?=[A-Z])(?i:{SYLLABLE}){SYLLABLE} (?=[A-Z])(?i:{SYLLABLE}){SYLLABLE}")    # Mira Kobe
FIELDS = {"population": (1_000, 999_999), "area": (10, 9_999), "elevation": (10, 2_999),
          "rainfall": (100, 2_999)}
UNITS = {"m": ("length", 1.0), "ft": ("length", 0.3048), "yd": ("length", 0.9144), "km": ("length", 1000.0),
         "kg": ("mass", 1.0), "lb": ("mass", 0.45359237), "oz": ("mass", 0.45359237 / 16),
         "g": ("mass", 0.001)}
COLUMNS = ("price", "stock", "weight", "size", "age", "rank", "score", "volume")
SPLITS = ("train", "heldout")


def digest(*parts) -> int:
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:8], "big")


def side(value) -> int:
    """0 or 1: whether a name or number belongs to training or to the held-out tasks."""
    return digest("side", value) % 2


def fresh(rng: random.Random, which: int, make: Callable):
    """The first value of make(rng) that lies on side `which`."""
    while side(value := make(rng)) != which:
        pass
    return value


def word(syllables: int) -> Callable[[random.Random], str]:
    return lambda rng: "".join(rng.choices(SYLLABLES, k=syllables)).capitalize()


def fact(name: str, field: str):
    """What the atlas holds. ToolError for a name or field that it does not have."""
    rng, which = random.Random(digest("atlas", name, field)), side(name)
    if not (TOWN.fullmatch(name) or PERSON.fullmatch(name)):
        raise ToolError(f"no entry {name!r}")
    fields = (*FIELDS, "tower", "twin", "mayor") if TOWN.fullmatch(name) else ("born", "home")
    if field not in fields:
        raise ToolError(f"{name} has no {field!r}; fields: {', '.join(f for f in fields if f != 'mayor')}")
    if field in ("twin", "home"):
        return fresh(rng, which, word(3))
    if field == "mayor":
        return fresh(rng, which, lambda r: f"{word(2)(r)} {word(2)(r)}")
    if field == "tower":
        return [fresh(rng, which, lambda r: r.randrange(20, 400)), rng.choice(("m", "ft", "yd"))]
    low, high = FIELDS.get(field, (1920, 1999))
    return fresh(rng, which, lambda r: r.randint(low, high))


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
class Drawn:
    """A task without its id, and the slots that it was made of (for demonstrations, see tiny.py)."""
    question: str
    answer: object
    level: int
    slots: dict
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Draw:
    """Draws what tasks are made of, all from one side of the world."""
    rng: random.Random
    side: int
    difficulty: int

    def town(self) -> str:
        return fresh(self.rng, self.side, word(3))

    def number(self, low: int, high: int) -> int:
        return fresh(self.rng, self.side, lambda rng: rng.randrange(low, high))

    def place(self, links: int | None = None) -> tuple[str, str, str]:
        """(how the question names it, the town meant, the town named); `links` twin towns lie between."""
        links = self.difficulty if links is None else links
        town = named = self.town()
        for _ in range(links):
            town = fact(town, "twin")
        return "the twin town of " * links + named, town, named

    def table(self) -> tuple[list[str], list[dict], dict[str, bytes]]:
        """(columns, rows, files): shop.csv with 4 + 30 d items and 2 + 2 d columns of distinct numbers."""
        d, size = self.difficulty, 4 + 30 * self.difficulty
        columns = self.rng.sample(COLUMNS, 2 + 2 * d)
        numbers = [v for v in range(10, 100 + 900 * d) if side(v) == self.side]
        values = {c: self.rng.sample(numbers, size) for c in columns}
        rows = [{"item": self.town()} | {c: values[c][i] for c in columns} for i in range(size)]
        if d >= 2:
            for row in rows:
                row[columns[-1]] = row[columns[-1]] if self.rng.random() < 0.8 else ""
        text = io.StringIO()
        writer = csv.DictWriter(text, ["item", *columns], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return columns, rows, {"shop.csv": text.getvalue().encode()}

    def condition(self, columns: list[str], rows: list[dict]) -> tuple[str, list[dict]]:
        """From difficulty 1 on: (text of a condition on the last column, the rows that meet it)."""
        bound = self.rng.randrange(100, 500) if self.difficulty else 0
        text = f" among items whose {columns[-1]} is above {bound} (empty means 0)" if self.difficulty else ""
        return text, [r for r in rows if (r[columns[-1]] or 0) > bound]


def draw_lookup(w: Draw) -> Drawn:
    field, places = w.rng.choice(list(FIELDS)), [w.place() for _ in range(1 + w.difficulty)]
    what = f"the {field} of" if len(places) == 1 else f"the sum of the {field} of"
    other = (*FIELDS, *FIELDS)[list(FIELDS).index(field) + 1]
    return Drawn(f"What is {what} {' and of '.join(p[0] for p in places)}?",
                 sum(fact(p[1], field) for p in places), 1,
                 {"name": places[0][2], "field": field, "other": other})


def draw_convert(w: Draw) -> Drawn:
    kind = w.rng.choice(("length", "mass"))
    source, target = w.rng.sample([u for u in UNITS if UNITS[u][0] == kind], 2)
    values = [w.number(11, 999) for _ in range(1 + 2 * w.difficulty)]
    answer = convert.function(sum(values), source, target)
    text = " plus ".join(f"{v} {source}" for v in values)
    return Drawn(f"How many {target} are {text}? Round to 2 decimals.", answer, 1,
                 {"value": values[0], "source": source, "target": target})


def draw_column(w: Draw) -> Drawn:
    columns, rows, files = w.table()
    asked, other = w.rng.sample(columns[:2], 2)
    text, chosen = w.condition(columns, rows)
    row = w.rng.choice(rows) if not w.difficulty else max(chosen, key=lambda r: r[other])
    item = f"the item with the highest {other}" if w.difficulty else row["item"]
    return Drawn(f"What is the {asked} of {item} in shop.csv{text}?", row[asked], 1,
                 {"name": row["item"], "column": asked, "other": other}, files)


def draw_total(w: Draw) -> Drawn:
    columns, rows, files = w.table()
    asked, other = w.rng.sample(columns[:2], 2)
    text, chosen = w.condition(columns, rows)
    return Drawn(f"What is the total {asked} in shop.csv{text}?", sum(r[asked] for r in chosen), 2,
                 {"column": asked, "other": other}, files)


def draw_twin(w: Draw) -> Drawn:
    field, (phrase, town, named) = w.rng.choice(list(FIELDS)), w.place(1 + w.difficulty)
    return Drawn(f"What is the {field} of {phrase}?", fact(town, field), 2, {"name": named, "field": field})


def draw_tower(w: Draw) -> Drawn:
    phrase, town, named = w.place()
    height, unit = fact(town, "tower")
    target = w.rng.choice([u for u in ("m", "ft", "yd") if u != unit])
    return Drawn(f"How high is the tower of {phrase} in {target}? Round to 2 decimals.",
                 convert.function(height, unit, target), 2, {"name": named, "unit": target})


def draw_mayor(w: Draw) -> Drawn:
    phrase, town, named = w.place()
    answer = fact(fact(town, "mayor"), "born")
    return Drawn(f"In which year was the mayor of {phrase} born?", answer, 2, {"name": named})


def draw_gap(w: Draw) -> Drawn:
    more, less = sorted((w.place(), w.place()), key=lambda p: -fact(p[1], "population"))
    return Drawn(f"How many more people live in {more[0]} than in {less[0]}?",
                 fact(more[1], "population") - fact(less[1], "population"), 3,
                 {"name": more[2], "second": less[2]})


def draw_arithmetic(w: Draw) -> Drawn:
    low, high = (11, 99) if w.side == 0 else (1_001, 99_999)    # held out: a range that training never shows
    a, b, *rest = [w.number(low, high) for _ in range(3 + 2 * w.difficulty)]
    text = f"{a} * {b} + " + " - ".join(map(str, rest))
    return Drawn(f"What is {text}?", a * b + rest[0] - sum(rest[1:]), 1, {"a": a, "b": b, "c": rest[0]})


def draw_dates(w: Draw) -> Drawn:
    first = date(1900, 1, 1) if w.side == 0 else date(2001, 1, 1)
    days = sorted(w.rng.sample(range(36_000), 2 + 2 * w.difficulty))
    dates = [str(first + timedelta(days=d)) for d in days]
    pairs = list(zip(dates[::2], dates[1::2]))
    text = " plus ".join(f"from {a} to {b}" for a, b in pairs)
    return Drawn(f"How many days is it {text}?", sum(b - a for a, b in zip(days[::2], days[1::2])), 1,
                 {"first": dates[0], "second": dates[1]})


def draw_largest(w: Draw) -> Drawn:
    places = [w.place() for _ in range(3 + w.difficulty)]
    best = max(places, key=lambda p: fact(p[1], "population"))
    text, right = ", ".join(p[0] for p in places), places.index(best)
    return Drawn(f"Which has the largest population: {text}? Give the town's own name.", best[1], 2,
                 {f"name{i}": p[2] for i, p in enumerate(places)}
                 | {"best": right, "worse": (right + 1) % len(places)})


CORE_FAMILIES = {"lookup": draw_lookup, "convert": draw_convert, "column": draw_column, "total": draw_total,
                 "twin": draw_twin, "tower": draw_tower, "mayor": draw_mayor, "gap": draw_gap}
HARD_FAMILIES = {"arithmetic": draw_arithmetic, "dates": draw_dates, "largest": draw_largest}
CORE, HARD = tuple(CORE_FAMILIES), tuple(HARD_FAMILIES)


def draw(family: str, split: str, rng: random.Random, difficulty: int = 0) -> Drawn:
    """One question of a family, with answer and slots. The world decides the facts, `rng` what is asked."""
    return (CORE_FAMILIES | HARD_FAMILIES)[family](Draw(rng, SPLITS.index(split), difficulty))


def builtin_tasks(split: str, n: int, seed: int, families: Iterable[str] = CORE + HARD,
                  difficulty: int = 0) -> list[Task]:
    """n tasks, the families in turn; the same arguments give the same tasks. split: "train" or "heldout",
    which share no entity; difficulty: 0 to 3, see the top. UserError for what does not exist."""
    families, tasks = tuple(families), []
    if not (split in SPLITS and families and {*families} <= {*CORE, *HARD} and difficulty in range(4)):
        raise UserError(f"no built-in tasks: split {split}, families {families}, difficulty {difficulty}")
    for i in range(n):
        family = families[i % len(families)]
        name = f"{split}-{family}-{i // len(families):04d}"
        drawn = draw(family, split, random.Random(f"{seed}-{name}-{difficulty}"), difficulty)
        level = str(min(3, drawn.level + difficulty))
        tasks.append(Task(name, drawn.question, str(drawn.answer), drawn.files, level, family))
    return tasks


def split_tasks(tasks: list[Task] | None, eval_tasks: int, seed: int, difficulty: int) -> tuple[list[Task], list[Task]]:
    """(training, held-out) tasks. None: the built-in ones, with eval_tasks held-out tasks per family. Of a user's own
    tasks a tenth is held out, at most eval_tasks, chosen by a fixed shuffle."""
    if tasks is None:
        heldout = [task for family in CORE + HARD
                   for task in builtin_tasks("heldout", eval_tasks, 0, (family,), difficulty)]
        return builtin_tasks("train", 3000, seed, CORE + HARD, difficulty), heldout
    if len(tasks) < 2:
        raise UserError(f"--data: {len(tasks)} tasks; at least 2 are needed, one of them held out")
    shuffled = list(tasks)
    random.Random("held out").shuffle(shuffled)
    n = min(eval_tasks, len(shuffled) // 10 or 1)
    return shuffled[n:], shuffled[:n]


def endless(tasks: list[Task], seed: int, first: int, n: int) -> list[Task]:
    """n tasks from number `first` on, of an endless sequence in which every epoch has its own shuffle."""
    chosen = []
    for i in range(first, first + n):
        epoch, index = divmod(i, len(tasks))
        if not chosen or index == 0:
            order = list(range(len(tasks)))
            random.Random(f"order-{seed}-{epoch}").shuffle(order)
        chosen.append(tasks[order[index]])
    return chosen


def every(n: int, tasks: list[Task]) -> list[Task]:
    """Of each family the first task and every n-th after it."""
    chosen = []
    for family in dict.fromkeys(task.family for task in tasks):
        chosen += [task for task in tasks if task.family == family][::n]
    return chosen


# ------------------------------------------------------------------------------------------------------ files
def read_rows(file: Path) -> list[tuple[int, dict]]:
    """(line number, record) of a jsonl or parquet file. UserError with file and line if it is malformed."""
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet
            return list(enumerate(pyarrow.parquet.read_table(file).to_pylist(), 1))
        lines = file.read_text("utf-8").split("\n")
    except ImportError as error:
        raise UserError(f"{file}: parquet needs pyarrow: pip install -r requirements-gaia.txt") from error
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (OSError, ValueError) as error:      # ValueError: no UTF-8, no parquet
        raise UserError(f"{file}: cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows += [(number, json.loads(line))] if line.strip() else []
        except ValueError as error:
            raise UserError(f"{file}:{number}: no JSON: {error}") from error
    return rows


def read_tasks(path: Path, fields: Callable) -> list[Task]:
    """Tasks of the records of a file, brought by `fields` to read_jsonl's names.

    UserError with file and line for what is malformed, duplicate or missing.
    """
    tasks, lines = [], {}
    for number, record in read_rows(path):
        if isinstance(record, dict) and record.get("task_id") == "0-0-0-0-0":   # GAIA's own placeholder
            continue
        try:
            task = parse_task(fields(record), path.parent)
            if task.id in lines:
                raise UserError(f"id {task.id!r} is already used in line {lines[task.id]}")
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from error
        lines[task.id] = number
        tasks.append(task)
    if not tasks:
        raise UserError(f"{path}: no tasks in it")
    return tasks


def read_jsonl(path: Path | str) -> list[Task]:
    """Tasks of lines {"id", "question", "answer", "files", "level"}; files: paths relative to the file."""
    return read_tasks(Path(path), lambda record: record)


def parse_task(record, folder: Path) -> Task:
    if not isinstance(record, dict):
        raise UserError(f"a task is a JSON object, not {type(record).__name__}")
    for key in ("id", "question", "answer"):
        value = record.get(key)
        if not isinstance(value, (str, int, float)) or isinstance(value, bool) or not str(value).strip():
            raise UserError(f"{key!r} is missing, empty or neither text nor number")
    names = record.get("files") or []
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise UserError("'files' is a list of paths relative to this file")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"attachment {folder / missing[0]} is missing")
    files = {Path(name).name: (folder / name).resolve() for name in names}
    if len(files) < len(names):
        raise UserError("two attachments have the same file name")
    return Task(str(record["id"]), str(record["question"]), str(record["answer"]), files,
                str(record.get("level") or "1"), str(record.get("family") or ""))


def export_gaia(tasks: list[Task], folder: Path) -> None:
    """Write tasks with one attachment at most: folder/2023/validation/metadata.jsonl, the files beside it."""
    out = folder / "2023" / "validation"
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for task in tasks:
        file_name = ""
        for name, content in task.files.items():
            file_name = f"{task.id}/{name}"     # GAIA has <task_id>.csv; ours keep the name in the question
            (out / task.id).mkdir(exist_ok=True)
            data = content if isinstance(content, bytes) else Path(content).read_bytes()
            (out / file_name).write_bytes(data)
        lines.append(json.dumps({"task_id": task.id, "Question": task.question, "Level": task.level,
                                 "Final answer": task.answer, "file_name": file_name}) + "\n")
    (out / "metadata.jsonl").write_text("".join(lines))


def read_gaia(folder: Path | str, split: str = "validation") -> list[Task]:
    """Tasks in GAIA's layout: metadata (jsonl or parquet) in folder[/2023][/<split>], the files beside it.

    Levels may be text or numbers. The test split has no answers: its tasks carry the answer "?".
    """
    places = [Path(folder) / below for below in (Path("2023") / split, split, ".")]
    found = [place / name for place in places for name in ("metadata.jsonl", "metadata.parquet")
             if (place / name).is_file()]
    if not found:
        raise UserError(f"{folder}: no metadata.jsonl or .parquet in it, in 2023/{split} or in {split}")
    return read_tasks(found[0], gaia_fields)


def gaia_fields(row) -> dict:
    if not isinstance(row, dict) or not {"task_id", "Question", "Level"} <= row.keys():
        raise UserError("no GAIA question, which has task_id, Question and Level")
    answer, name = row.get("Final answer"), row.get("file_name")
    return {"id": row["task_id"], "question": row["Question"], "level": row["Level"], "family": "gaia",
            "answer": "?" if answer in (None, "") else answer, "files": [name] if name else []}
