"""scripts/data.py and the GAIA reader of tasks.py: what is kept of published data and what is dropped."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import data
from scripts.data import overlap, pair_of, read_mat
from tasks import Task, missing_files, read_gaia, read_jsonl
from machinery.cli import UserError

ROOT = Path(__file__).parent.parent


def record(question="How many red cars are in the picture?", answer="final_answer(3)", seen="There are 3 red cars",
           **more):
    return {"id": "m1", "conversations": [
        {"role": "system", "content": "You are an agent."}, {"role": "user", "content": f"<image>\nTask:\n{question}"},
        {"role": "assistant", "content": "Thought: look.\nCode:\n```py\nask()\n```"},
        {"role": "user", "content": f"[OUTPUT]: {seen}"},
        {"role": "assistant", "content": f"Code:\n```py\n{answer}\n```"}], **more}


def test_a_pair_from_a_conversation(tmp_path):
    (tmp_path / "car.jpg").write_bytes(b"x")
    task = pair_of(record(image="data/images/car.jpg"), tmp_path)
    assert task == Task("m1", "How many red cars are in the picture?", "3", {"car.jpg": tmp_path / "car.jpg"}, "1",
                        "mat")
    old = {"id": 5, "conversations": [
        {"from": "human", "value": "Which town is the capital of Peru?\nAttachment: car.jpg"},
        {"from": "gpt", "value": "final_answer('Lima')"}, {"from": "observation", "value": "LIMA"},
        {"from": "gpt", "value": "final_answer(answer=['Lima', 'Peru'])"}]}
    old["conversations"][2]["value"] = "Lima, Peru"
    assert pair_of(old, tmp_path) == Task("5", "Which town is the capital of Peru?", "Lima, Peru",
                                          {"car.jpg": tmp_path / "car.jpg"}, "1", "mat")


BAD = [
    (record(question="Why?"), "no question"), (record(answer="print(3)"), "no answer"),
    (record(answer="final_answer(f'{x}')"), "answer is not a constant"),
    (record(answer=f"final_answer('{'long ' * 20}')"), "answer not short"),
    (record(question="What is the current population of Lima in Peru?"), "time-volatile"),
    (record(question="Who is the latest winner of that big prize?"), "time-volatile"),
    (record(seen="There are many"), "answer not verified"),
    (record(seen="13 cars, 3.5 of them, 32 wheels"), "answer not verified"),
    (record(image={"<image_0>": "none.jpg"}), "file missing"), ("text", "no record")]


def test_every_drop_is_counted_by_reason(tmp_path):
    file = tmp_path / "mat.json"
    again = record(question="How many RED cars are in the picture")
    file.write_text(json.dumps([r for r, _ in BAD] + [record(), again]))
    tasks, dropped = read_mat(file, tmp_path)
    assert [t.answer for t in tasks] == ["3"] and dropped["duplicate"] == 1
    wanted = {}
    for _, reason in BAD:
        wanted[reason] = wanted.get(reason, 0) + 1
    assert dropped == wanted | {"duplicate": 1}


def test_bad_files_are_named(tmp_path):
    (tmp_path / "a.json").write_text("[1,\n2")
    (tmp_path / "b.jsonl").write_text("{}\n{")
    (tmp_path / "c.json").write_bytes(b"[\xff]")
    for name, complaint in [("a.json", "a.json: .*line 2 "), ("b.jsonl", "b.jsonl:2: "), ("c.json", "c.json: ")]:
        with pytest.raises(UserError, match=complaint):
            read_mat(tmp_path / name, tmp_path)
        assert data.main([str(tmp_path / name), "--out", str(tmp_path / "out.jsonl")]) == 2


def test_a_training_file_is_checked_whole(tmp_path, capsys):
    """--n limits what is taken of MAT: all of the user's own data comes back, unless --n is given."""
    (tmp_path / "own.jsonl").write_text("".join(
        json.dumps({"id": i, "question": f"What is {i} plus {i}?", "answer": 2 * i}) + "\n" for i in range(1400)))
    assert data.main([str(tmp_path / "own.jsonl"), "--out", str(tmp_path / "all.jsonl")]) == 0
    assert data.main([str(tmp_path / "own.jsonl"), "--out", str(tmp_path / "ten.jsonl"), "--n", "10"]) == 0
    assert [len(read_jsonl(tmp_path / name)) for name in ("all.jsonl", "ten.jsonl")] == [1400, 10]
    assert "not checked against GAIA" in capsys.readouterr().out


def test_equal_ids_are_told_apart(tmp_path):
    file = tmp_path / "mat.jsonl"
    records = [record(question=f"How many {colour} cars are there?") for colour in ("red", "blue")]
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    assert [t.id for t in read_mat(file, tmp_path)[0]] == ["m1", "m1-1"]


EXAM = [Task("g1", "If Ada Brunner could row her record-making lake crossing pace without resting, how many days?",
             "17"),
        Task("g2", "In the film that Greta Lind made in Oslo in 1987, who plays Hedda?", "Ruth Aasen")]


@pytest.mark.parametrize("question, answer, reason", [
    ("Suppose that Brunner could row her record-making lake crossing pace without resting, how far?", "9",
     "8-gram of g1"),
    ("Who plays Hedda in what Greta Lind made in Oslo in 1987?", "x", "entities of g2"),
    ("Who was the wife of the painter who lived in Oslo?", "Ruth Aasen", "answer and an entity of g2"),
    ("Who was the wife of the painter?", "Ruth Aasen", None), ("How old was Ada Brunner then?", "17", None)])
def test_overlap_by_hand(question, answer, reason):
    assert overlap([Task("t", question, answer)], EXAM) == ({"t": [reason]} if reason else {})


def gaia_folder(folder, rows, kind="jsonl", level=str):
    place = folder / "2023" / "validation"
    place.mkdir(parents=True)
    rows = [{"task_id": t.id, "Question": t.question, "Level": level(t.level), "Final answer": t.answer,
             "file_name": next(iter(t.files), ""), "Annotator Metadata": {"Steps": "1. look"}} for t in rows]
    if kind == "jsonl":
        (place / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    else:
        pyarrow = pytest.importorskip("pyarrow", reason="pip install -r requirements-gaia.txt")
        import pyarrow.parquet as parquet
        parquet.write_table(pyarrow.Table.from_pylist(rows), place / "metadata.parquet")
    return place


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("level", [str, int])
def test_gaia_layout(tmp_path, kind, level):
    place = gaia_folder(tmp_path, [Task("a", "Q?", "17", {"a.txt": b""}, "2"), Task("b", "R?", "x, y", {}, "3")],
                        kind, level)
    (place / "a.txt").write_text("t")
    tasks = read_gaia(tmp_path)
    assert [(t.id, t.question, t.answer, t.level, t.family) for t in tasks] == [
        ("a", "Q?", "17", "2", "gaia"), ("b", "R?", "x, y", "3", "gaia")]
    assert tasks[0].files == {"a.txt": place / "a.txt"} and tasks == read_gaia(place)
    (place / "a.txt").unlink()
    assert missing_files(read_gaia(tmp_path)) == [place / "a.txt"]         # the user of the tasks decides


def test_gaia_errors_are_named(tmp_path):
    with pytest.raises(UserError, match="no metadata.jsonl"):
        read_gaia(tmp_path)
    for text, complaint in [("{}\n", ":1: no GAIA question"), ("{\n", ":1: "), ('[1]\n', ":1: no GAIA question")]:
        (tmp_path / "metadata.jsonl").write_text(text)
        with pytest.raises(UserError, match=complaint):
            read_gaia(tmp_path)
    row = json.dumps({"task_id": "a", "Question": "Q", "Level": 1, "Final answer": "1", "file_name": ""}) + "\n"
    (tmp_path / "metadata.jsonl").write_text(row * 2)
    with pytest.raises(UserError, match="id 'a' is already used in line 1"):
        read_gaia(tmp_path)
    (tmp_path / "metadata.jsonl").write_text(row.replace('"Final answer": "1", ', ""))
    assert read_gaia(tmp_path)[0].answer == "?"


def test_the_one_command(tmp_path):
    gaia_folder(tmp_path / "gaia", EXAM)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "car.jpg").write_bytes(b"x")
    records = [record(question=f"How many of the {w} cars are in the picture?", image="car.jpg", id=w)
               for w in "abcdefghij"]
    records += [r for r, _ in BAD]
    records += [record(question="Who plays Hedda in what Greta Lind made in Oslo in 1987?", id="leak")]
    (tmp_path / "mat.json").write_text(json.dumps(records))

    def make(out, *flags):
        command = [sys.executable, "-m", "scripts.data", "mat.json", "--files", "files", "--out", out, *flags]
        return subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
                              text=True)
    done = make("train.jsonl", "--n", "6", "--gaia-dir", "gaia", "--remove-overlap")
    assert done.returncode == 0, done.stderr
    assert "21 records read, 6 kept" in done.stdout and "1 share something with GAIA, removed" in done.stdout
    tasks, report = read_jsonl(tmp_path / "train.jsonl"), json.loads((tmp_path / "train.jsonl.report.json").read_text())
    assert [t.id for t in tasks] == report["ids"] and report["seed"] == 0
    assert report["flagged"] == {"leak": ["entities of g2"]}
    assert tasks[0].files == {"car.jpg": (tmp_path / "files" / "car.jpg").resolve()}
    assert report["dropped"]["time-volatile"] == 2 and report["dropped"]["beyond --n"] == 4 and report["read"] == 21
    assert make("again.jsonl", "--n", "6", "--gaia-dir", "gaia", "--remove-overlap").returncode == 0
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "train.jsonl").read_text()
    again = make("train.jsonl")
    assert again.returncode == 2
    assert again.stderr == "error: --out train.jsonl exists already, and nothing is overwritten\n"
    assert make("x.jsonl", "--remove-overlap").returncode == 2 and not (tmp_path / "x.jsonl").exists()
    clean = str(tmp_path / "clean.jsonl")
    assert data.main([str(tmp_path / "train.jsonl"), "--gaia-dir", str(tmp_path / "gaia"), "--out", clean]) == 0
    assert read_jsonl(tmp_path / "clean.jsonl") == tasks
