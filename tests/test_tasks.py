"""tasks.py: gold answers found in another way, splits that share nothing, difficulty, files read and refused."""
import ast
import csv
import hashlib
import json
import random
import re
from datetime import date

import pytest

from gaia_folder import export_gaia
from tasks import (BUILTIN_TOOLS, CORE, HARD, PERSON, RANGES, TOWN, UNITS, Parts, Task, builtin_tasks, endless, every,
                   fact, read_gaia, read_jsonl, side, split_tasks)
from machinery.cli import UserError
from tools import ToolContext, ToolError, prompt_text

lookup, search, convert = (tool.bind(ToolContext()) for tool in BUILTIN_TOOLS)
NAMES = re.compile(rf"\b(?:{PERSON.pattern}|{TOWN.pattern})\b")


# ----------------------------------------------------------------- the answer, from the question's text alone


def town_of(phrase: str) -> str:
    """Follow "the twin town of the twin town of Kavodu"."""
    name = phrase.split()[-1].strip("?.,")
    for _ in range(phrase.count("twin town of")):
        name = lookup(name, "twin")
    return name


def rows_of(task: Task, condition: str | None) -> list[dict]:
    rows = list(csv.DictReader(task.files["shop.csv"].decode().splitlines()))
    if condition:
        column, bound = re.search(r"whose (\w+) is above (\d+)", condition).groups()
        rows = [r for r in rows if int(r[column] or 0) > int(bound)]
    return rows


def solve(task: Task) -> str:
    """Read the question and work it out with the tools."""
    q = task.question
    if m := re.fullmatch(r"What is (?:the sum of )?the (\w+) of ((?:the twin town of |[A-Z]).*)\?", q):
        if "shop.csv" not in q:
            return str(sum(lookup(town_of(p), m[1]) for p in m[2].split(" and of ")))
    if m := re.fullmatch(r"What is the (\w+) of (\w+) in shop.csv\?", q):
        return next(r[m[1]] for r in rows_of(task, None) if r["item"] == m[2])
    if m := re.fullmatch(r"What is the (\w+) of the item with the highest (\w+) in shop.csv( among.*)\?", q):
        return max(rows_of(task, m[3]), key=lambda r: int(r[m[2]]))[m[1]]
    if m := re.fullmatch(r"What is the total (\w+) in shop.csv( among.*)?\?", q):
        return str(sum(int(r[m[1]]) for r in rows_of(task, m[2])))
    if m := re.fullmatch(r"How many (\w+) are (.*)\? Round to 2 decimals\.", q):
        amounts = [part.split() for part in m[2].split(" plus ")]
        return str(convert(sum(int(a) for a, _ in amounts), amounts[0][1], m[1]))
    if m := re.fullmatch(r"How high is the tower of (.*) in (\w+)\? Round to 2 decimals\.", q):
        return str(convert(*lookup(town_of(m[1]), "tower"), m[2]))
    if m := re.fullmatch(r"In which year was the mayor of (.*) born\?", q):
        return str(lookup(search(f"Who is the mayor of {town_of(m[1])}?").split(" is ")[0], "born"))
    if m := re.fullmatch(r"How many more people live in (.*) than in (.*)\?", q):
        return str(lookup(town_of(m[1]), "population") - lookup(town_of(m[2]), "population"))
    if m := re.fullmatch(r"What is ([\d*+ -]+)\?", q):
        terms = [1]
        for sign, number in re.findall(r"([*+-]?) ?(\d+)", m[1]):
            if sign in ("", "*"):
                terms[-1] *= int(number)
            else:
                terms.append(int(sign + number))
        return str(sum(terms))
    if m := re.findall(r"from (\S+) to (\S+?)[ ?]", q.replace("?", "? ")):
        return str(sum((date.fromisoformat(b.strip("?")) - date.fromisoformat(a)).days for a, b in m))
    m = re.fullmatch(r"Which has the largest population: (.*)\? Give the town's own name\.", q)
    return max(map(town_of, m[1].split(", ")), key=lambda name: lookup(name, "population"))


@pytest.mark.parametrize("difficulty", range(4))
@pytest.mark.parametrize("family", CORE + HARD)
def test_gold_answers_are_found_again_from_the_question(family, difficulty):
    for split in ("train", "heldout"):
        for task in builtin_tasks(split, 12, 7, (family,), difficulty):
            assert solve(task) == task.answer, task


# ------------------------------------------------------------------------------------------- the built-in tasks


def test_eight_core_and_three_hard_families_of_three_levels():
    assert len(CORE) >= 8 and len(HARD) >= 3 and not set(CORE) & set(HARD)
    tasks = builtin_tasks("heldout", 110, 0)
    assert {t.level for t in tasks if t.family in CORE} == {"1", "2", "3"}
    assert [t.family for t in tasks[:11]] == list(CORE + HARD)
    assert len({t.id for t in tasks}) == 110 and tasks[0].id == "heldout-lookup-0000"


def test_the_same_arguments_give_the_same_tasks_and_another_seed_others():
    first = builtin_tasks("train", 44, 3)
    assert first == builtin_tasks("train", 44, 3)
    assert first[:22] == builtin_tasks("train", 22, 3)
    assert not {t.question for t in first} & {t.question for t in builtin_tasks("train", 44, 4)} - {
        t.question for t in first if t.family == "total"}     # "the total price in shop.csv": other tables


def entities(tasks: list[Task]) -> set[str]:
    return {name for t in tasks for name in NAMES.findall(t.question + str(t.files))}


def test_the_built_in_tasks_are_those_of_the_published_figures():
    """All figures of README are of these tasks: another world, task, answer, file or order is another benchmark."""
    built = [[task for split in ("train", "heldout") for task in builtin_tasks(split, 220, 0, difficulty=d)]
             for d in range(4)]
    assert hashlib.sha256(repr((RANGES, UNITS, built)).encode()).hexdigest()[:12] == "12e0ef3e751d"


def test_train_and_heldout_share_no_entity_and_no_value():
    train, heldout = builtin_tasks("train", 1100, 0), builtin_tasks("heldout", 1100, 1)
    assert {side(n) for n in entities(train)} == {0} and {side(n) for n in entities(heldout)} == {1}
    assert not {t.question for t in train if t.family != "total"} & {t.question for t in heldout}
    facts = [{t.answer for t in tasks if t.family in ("lookup", "twin", "mayor", "column")}
             for tasks in (train, heldout)]
    assert not facts[0] & facts[1]
    for name in list(entities(train))[:50]:                     # and so for everything one fact further away
        if TOWN.fullmatch(name):
            assert side(fact(name, "twin")) == side(fact(fact(name, "mayor"), "home")) == side(name)


def test_no_answer_stands_in_a_prompt():
    for difficulty in (0, 2):
        for task in builtin_tasks("heldout", 550, 0, difficulty=difficulty):
            if task.family != "largest" or difficulty:     # which of three towns: one of them is the answer
                assert task.answer not in re.findall(r"[\w.-]*\w", task.question), task


def test_held_out_arithmetic_and_dates_lie_outside_the_range_of_training():
    for family in ("arithmetic", "dates"):
        ranges = []
        for split in ("train", "heldout"):
            numbers = [int(n) for t in builtin_tasks(split, 100, 0, (family,))
                       for n in re.findall(r"\d{4}(?=-)" if family == "dates" else r"\d+", t.question)]
            ranges.append((min(numbers), max(numbers)))
        assert ranges[0][1] < ranges[1][0]


def test_difficulty_makes_chains_longer_and_tables_bigger():
    for family in CORE + HARD:
        sizes = [len(t.question) + len(t.files.get("shop.csv", b"")) for d in range(4)
                 for t in builtin_tasks("train", 1, 0, (family,), d)]
        levels = [int(t.level) for d in range(4) for t in builtin_tasks("train", 1, 0, (family,), d)]
        assert sizes == sorted(set(sizes)) and levels == sorted(levels) and levels[-1] == 3


def test_a_tables_condition_names_a_number_from_100_to_499():
    for chosen, bound in ((min, 100), (max, 499)):
        rng = random.Random(0)
        rng.randrange = lambda low, high, chosen=chosen: chosen(low, high - 1)
        assert f"is above {bound} " in Parts(rng, 0, 1).table()[2]


def test_unknown_splits_families_and_difficulties_are_refused():
    wrongs = ("test", 1, 0), ("train", 1, 0, ("riddle",)), ("train", 1, 0, ()), ("train", 1, 0, CORE, 4)
    for wrong in wrongs:
        with pytest.raises(UserError):
            builtin_tasks(*wrong)


def test_which_tasks_are_held_out_and_in_what_order_the_others_come():
    tasks = [Task(str(i), "?", "1", family="ab"[i % 2]) for i in range(25)]
    for n, eval_tasks, heldout in ((25, 9, 2), (25, 1, 1), (3, 9, 1), (2, 9, 1)):
        parts = split_tasks(tasks[:n], eval_tasks, 0, 0)
        assert [len(part) for part in parts] == [n - heldout, heldout]
        assert parts == split_tasks(tasks[:n], eval_tasks, 1, 0)        # whatever the seed
        assert sorted(parts[0] + parts[1], key=lambda task: int(task.id)) == tasks[:n]
    with pytest.raises(UserError, match="1 tasks"):
        split_tasks(tasks[:1], 9, 0, 0)
    training, heldout = split_tasks(None, 2, 5, 1)
    assert (len(training), training[:11]) == (3000, builtin_tasks("train", 11, 5, difficulty=1))
    assert [task.family for task in heldout] == [family for family in CORE + HARD for _ in range(2)]
    order = endless(tasks[:5], 7, 0, 20)
    epochs = [order[i:i + 5] for i in range(0, 20, 5)]
    assert all(sorted(epoch, key=lambda task: task.id) == tasks[:5] for epoch in epochs) and epochs[0] != epochs[1]
    assert endless(tasks[:5], 7, 8, 9) == order[8:17] and endless(tasks[:5], 8, 0, 20) != order
    assert [task.id for task in every(4, tasks)] == ["0", "8", "16", "24", "1", "9", "17"]


# -------------------------------------------------------------------------------------------------- the tools


def test_the_tools_know_the_world_and_refuse_in_one_line():
    assert lookup("Kavodu", "area") == fact("Kavodu", "area")
    assert search("mayor of Kavodu") == f"{fact('Kavodu', 'mayor')} is the mayor of Kavodu."
    assert search("weather in Kavodu") == search("mayor of Paris") == "Nothing found."
    assert convert(1, "km", "m") == 1000.0 and convert(2.5, "lb", "kg") == 1.13
    for arguments in (("Paris", "area"), ("Kavodu", "born"), ("Kavodu", "mayor"), ("Kavodu",), (1, "m", "kg"),
                      (1, "inch", "m"), ("1", "m", "ft")):
        with pytest.raises(ToolError) as error:
            (convert if len(arguments) == 3 else lookup)(*arguments)
        assert "\n" not in str(error.value)
    assert all(name in prompt_text(BUILTIN_TOOLS) for name in ("lookup(", "search(", "convert("))


# ------------------------------------------------------------------------------------------------------ files


def write(folder, *lines):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "t.jsonl").write_text(text)
    return folder / "t.jsonl"


def test_read_jsonl(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.csv").write_text("x\n1\n")
    path = write(tmp_path, {"id": 1, "question": "a line\u2028break?", "answer": 2.5}, "",
                 {"id": "b", "question": "x?", "answer": "1", "files": ["data/a.csv"], "level": 2})
    first, second = read_jsonl(path)
    assert (first.id, first.question, first.answer, first.level) == ("1", "a line\u2028break?", "2.5", "1")
    assert dict(second.files) == {"a.csv": tmp_path / "data" / "a.csv"} and second.level == "2"


GOOD = {"id": "a", "question": "x?", "answer": "1"}


@pytest.mark.parametrize("line, message", [
    ("{", "t.jsonl:2: cannot be read: JSONDecodeError"),
    ("[1]", "t.jsonl:2: a task is a JSON object"),
    ({"id": "b", "question": "x?"}, "t.jsonl:2: 'answer'"),
    ({"id": "b", "question": " ", "answer": "1"}, "t.jsonl:2: 'question'"),
    ({"id": "b", "question": "x?", "answer": True}, "t.jsonl:2: 'answer'"),
    (GOOD, "t.jsonl:2: id 'a' is already used in line 1"),
    (GOOD | {"id": "b", "files": ["no.csv"]}, "no.csv is missing"),
    (GOOD | {"id": "b", "files": "t.jsonl"}, "t.jsonl:2: 'files' is a list"),
    (GOOD | {"id": "b", "files": ["t.jsonl", "./t.jsonl"]}, "t.jsonl:2: two attachments"),
])
def test_bad_lines_are_named_by_file_and_line(tmp_path, line, message):
    with pytest.raises(UserError) as error:
        read_jsonl(write(tmp_path, GOOD, line))
    assert "t.jsonl:2: " in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def test_missing_empty_and_binary_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="no tasks in it"):
        read_jsonl(write(tmp_path, "", ""))
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="cannot be read: UnicodeDecodeError"):
        read_jsonl(tmp_path / "b.jsonl")
    pytest.importorskip("pyarrow", reason="pip install -r requirements-gaia.txt")
    (tmp_path / "metadata.parquet").write_bytes(b"half of it")
    with pytest.raises(UserError, match="metadata.parquet: cannot be read"):
        read_gaia(tmp_path)


def test_built_in_tasks_survive_the_gaia_layout(tmp_path):
    tasks = builtin_tasks("heldout", 22, 0)
    export_gaia(tasks, tmp_path)
    again = read_gaia(tmp_path)
    assert [(t.id, t.question, t.answer, t.level) for t in again] == \
        [(t.id, t.question, t.answer, t.level) for t in tasks]
    assert [{n: p.read_bytes() for n, p in t.files.items()} for t in again] == [dict(t.files) for t in tasks]


def test_a_gaia_answer_of_zero_is_an_answer_and_a_question_of_nothing_is_refused(tmp_path):
    row = {"task_id": "a", "Question": "How many?", "Level": 1, "Final answer": 0}
    (tmp_path / "metadata.jsonl").write_text('{"task_id": "0-0-0-0-0"}\n' + json.dumps(row))     # a placeholder
    assert [t.answer for t in read_gaia(tmp_path)] == ["0"]
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row | {"Question": None}))
    with pytest.raises(UserError, match=":1: 'question'"):
        read_gaia(tmp_path)


def test_a_table_is_a_literal_of_numbers():
    """What "in the table" means: every cell but the item's name is a plain number, so int() reads it."""
    for task in builtin_tasks("train", 20, 0, ("column", "total"), 1):
        for row in rows_of(task, None):
            assert all(isinstance(ast.literal_eval(v), int) for k, v in row.items() if k != "item")
