"""Careless users and hostile files: two runs in one folder, output that nobody reads, any bytes as data."""
import errno
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from machinery.cli import Output, UserError, exit_status
from machinery.folder import alone_in, claim_folder, reading
from policy import TINY_DIR
from rollout import Chat, build_prompt
from scripts.data import read_mat
from tasks import missing_files, read_gaia, read_jsonl

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--groups", "2", "--group-size", "2", "--resample", "0", "--eval-tasks", "1"]


def start(program: str, *arguments, **more) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, ROOT / program, *map(str, arguments)], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True, **more,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))


def wait_for(true, process):
    while not true():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------------- the lock
def test_a_folder_has_one_holder_and_a_kill_frees_it(tmp_path):
    out = tmp_path / "out"
    code = (f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\n"
            f"from machinery.folder import alone_in\nwith alone_in(Path({str(out)!r})):\n    time.sleep(60)\n")
    process = subprocess.Popen([sys.executable, "-c", code])
    lock = tmp_path / "out.lock"
    wait_for(lambda: lock.exists() and lock.read_text(), process)
    (tmp_path / "link").symlink_to(out)
    for way in (out, tmp_path / "link", tmp_path / "other" / ".." / "out"):
        with pytest.raises(UserError, match=f"process {process.pid} works in it"), alone_in(way):
            pytest.fail("two holders")
    process.kill()
    process.wait()
    assert lock.exists()                                            # what a kill leaves does no harm
    with alone_in(out):
        with pytest.raises(UserError, match=f"process {os.getpid()} "), alone_in(out):
            pytest.fail("two holders")
    assert not lock.exists() and not out.exists()


def test_an_older_run_behind_a_link_is_moved_where_it_is(tmp_path, capsys):
    (tmp_path / "disk" / "run").mkdir(parents=True)
    (tmp_path / "disk" / "run" / "run.json").write_text("{}")
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "run")
    claim_folder(tmp_path / "out", "run.json", "run")
    assert (tmp_path / "disk" / "run.1" / "run.json").exists() and not list((tmp_path / "disk" / "run").iterdir())
    assert (tmp_path / "out").is_symlink() and "moved to" in capsys.readouterr().out


TRAIN, EVAL = ["train.py", "--out", "o", "--steps", "500", *SMALL], ["eval_gaia.py", "--out", "o", "--samples", "99"]
STEP_1, RECORD = Path("o/state/step-000001"), Path("o/trajectories.jsonl")
WAYS = {        # the first command; after what (seconds, a file that is there) the second one starts; the second
    "at once": (TRAIN, 0, TRAIN),
    "half a second later": (TRAIN, 0.5, TRAIN),
    "during the imports": (TRAIN, 3, TRAIN),
    "as soon as the lock is there": (TRAIN, Path("o.lock"), TRAIN),
    "as soon as the folder is there": (TRAIN, Path("o/run.json"), TRAIN),
    "after a step": (TRAIN, STEP_1, TRAIN),
    "resume beside a live run": (TRAIN, STEP_1, ["train.py", "--out", "o", "--resume"]),
    "two resumes at once": (["train.py", "--out", "o", "--resume"], 0, ["train.py", "--out", "o", "--resume"]),
    "an evaluation into a live run": (TRAIN, STEP_1, EVAL),
    "two evaluations at once": (EVAL, 0, EVAL),
    "an evaluation with other settings": (EVAL, RECORD, [*EVAL, "--seed", "1"]),
    "both over an older run": (TRAIN, 0, TRAIN)}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_of_two_at_once_one_goes_on_and_the_other_ends_with_one_line(way, tmp_path):
    first, after, second = WAYS[way]
    if way in ("two resumes at once", "both over an older run"):
        old = start(*TRAIN, cwd=tmp_path)
        wait_for((tmp_path / STEP_1).exists, old)
        old.kill()
        old.wait()
    processes = [start(*first, cwd=tmp_path)]
    if isinstance(after, Path):
        wait_for((tmp_path / after).exists, processes[0])
    else:
        time.sleep(after)
    processes.append(start(*second, cwd=tmp_path))
    wait_for(lambda: any(p.poll() is not None for p in processes), processes[0])
    [loser] = [p for p in processes if p.poll() is not None]
    [winner] = [p for p in processes if p is not loser]
    error = loser.communicate()[1]
    assert loser.returncode == 2 and "Traceback" not in error
    [line] = [line for line in error.splitlines() if line.startswith("error: ")]
    assert re.search(rf"--out o: process {winner.pid} works in it", line)
    log = tmp_path / ("o/metrics.jsonl" if "train.py" in first else RECORD)
    size = log.stat().st_size if log.exists() else 0
    wait_for(lambda: log.exists() and log.stat().st_size > size + 10, winner)     # it goes on
    winner.send_signal(signal.SIGINT)
    assert "Traceback" not in winner.communicate()[1] and winner.returncode == 130
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    if "train.py" in first:
        assert [line["step"] for line in lines] == list(range(len(lines)))
        done = subprocess.run([sys.executable, ROOT / "train.py", "--resume", "--out", "o", "--steps", "1"],
                              cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert len({(line.get("sample"), line.get("task_id"), line.get("step")) for line in lines}) == len(lines)
    assert (tmp_path / "o.1").exists() == (way == "both over an older run")


# --------------------------------------------------------------------------------------------------------- output
class Full(io.StringIO):
    """A stream on a full disk, or into a pipe that nobody reads."""
    def __init__(self, number):
        super().__init__()
        self.number, self.file = number, os.memfd_create("stream")

    def write(self, text):
        raise OSError(self.number, os.strerror(self.number))

    def fileno(self):
        return self.file


def test_output_never_raises():
    for number in (errno.EPIPE, errno.ENOSPC):
        stream = Full(number)
        assert Output(stream).write("text") == 4
        assert os.readlink(f"/proc/self/fd/{stream.file}") == "/dev/null"      # so Python's last flush succeeds
        os.close(stream.file)
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    print("Zürich \ud800", file=Output(ascii_only))
    assert ascii_only.buffer.getvalue() == b"Z\\xfcrich \\ud800\n"
    print("nothing", file=Output(None))
    said = io.StringIO()
    print("a\tb\r\x1b[2Jc\x00\x9b", file=Output(said))                     # no text clears the terminal
    assert said.getvalue() == "a\tb\r\\x1b[2Jc\\x00\\x9b\n"


def test_a_run_outlives_a_closed_pipe_an_ascii_terminal_and_half_a_character(tmp_path):
    rows = [{"id": f"Zürich {i}", "question": "What is \ud800 in Zürich?", "answer": "é\udc00"} for i in range(4)]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    command = [sys.executable, ROOT / "train.py", "--out", "o", "--steps", "1", "--data", "d.jsonl", *SMALL]
    plain = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    read, write = os.pipe()
    process = subprocess.Popen(command, cwd=tmp_path, env=plain, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert os.read(read, 1000)
    os.close(read)                                                          # as `| head -3` does
    assert process.wait() == 0, process.stderr.read()
    errors = process.stderr.read()
    assert "Traceback" not in errors and "BrokenPipe" not in errors
    said = subprocess.run([*command, "--resume", "--steps", "2"], cwd=tmp_path, env=plain, capture_output=True)
    assert said.returncode == 0 and b"step   2 |" in said.stdout
    for row in (tmp_path / "o" / "trajectories.jsonl").read_text().splitlines():
        assert json.loads(row)["question"] == rows[0]["question"]


def test_files_that_nobody_foresaw_end_a_command_in_one_line(capsys):
    def forbidden():
        open("x" * 5000)
    assert exit_status(forbidden) == 2
    assert capsys.readouterr().err.startswith("error: [Errno 36] File name too long")
    for error in (OSError(28, "No space left"), RecursionError(), KeyError("x"), json.JSONDecodeError("x", "y", 0)):
        with pytest.raises(UserError, match="a.json: cannot be read: .*[.] So"), reading("a.json", "So"):
            raise error


def test_ctrl_c_during_the_imports_leaves_no_traceback():
    for program in ("train.py", "eval_gaia.py"):
        process = start(program)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.communicate()[1] and process.returncode == -signal.SIGINT


# ------------------------------------------------------------------------------------------------------ data files
HOSTILE = [
    None, True, 0, -1, 1e999, float("nan"), 10**400, "", " ", "\x00", "a\nb", "\x1b[2J", "\ud800", "é" * 50, [], {},
    [[]], {"a": [1]}, "/etc/passwd", "../secret", "link", "linked/passwd", "x" * 5000, "../" * 2000, "ok.txt",
    ["ok.txt"], ["../secret"], ["/etc/passwd"], ["link"], ["linked/passwd"], ["ok.txt", "./ok.txt"],
    ["x" * 5000], ["\x00"],
    ["a\nb"], ["\ud800"], [""], ["."], [".."], ["loop"], ["~/.ssh/id_rsa"], ["file:///etc/passwd"], [None], "1",
    "2", 2.5]
GOOD = {"id": "a", "question": "What is 2 + 2?", "answer": "4", "files": ["ok.txt"], "level": 1, "family": "sums"}
GAIA = {"task_id": "a", "Question": "What is 2 + 2?", "Final answer": "4", "file_name": "ok.txt", "Level": 1}
MAT = {"id": "m", "image": "ok.txt", "conversations": [
    {"role": "user", "content": "What is the sum of 2 and 2?"}, {"role": "user", "content": "The sum is 4."},
    {"role": "assistant", "content": "final_answer(4)"}]}


def mutated(rng: random.Random, good: dict) -> bytes:
    """A data file as nobody should write it: fields exchanged or lost, bytes flipped, cut, or anything at all."""
    rows = [{**good, next(iter(good)): f"{i}"} for i in range(rng.randrange(1, 4))]
    for row in rows:
        for key in rng.sample([*row, "extra"], rng.choice([0, 0, 1, 2])):
            row[key] = rng.choice(HOSTILE)
            if rng.random() < 0.2:
                del row[key]
    lines = [json.dumps(rng.choice([row] * 8 + [[row], rng.choice(HOSTILE)])) for row in rows]
    data = rng.choice(["\n", "\n", "\r\n", ","]).join(lines)
    data = rng.choice([data] * 6 + [f"[{data}]", "[" * 100_000, data + '{"a":' * 100_000, f"[{data}"])
    data = rng.choice([b"", b"", b"", b"\xef\xbb\xbf"]) + data.encode(rng.choice(["utf-8"] * 9 + ["utf-16"]))
    how = rng.random()
    if how < 0.1:
        return rng.randbytes(rng.randrange(200))
    if how < 0.2:
        return data[:rng.randrange(len(data))]
    if how < 0.4:
        data = bytearray(data)
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


@pytest.fixture
def place(tmp_path):
    """A folder of data, and what must not be reached from it."""
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "secret").write_text("secret")
    (folder / "ok.txt").write_text("fine")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "linked").symlink_to("/etc")
    (folder / "loop").symlink_to(folder / "loop")
    return folder


READERS = {"jsonl": ("t.jsonl", GOOD, lambda folder: read_jsonl(folder / "t.jsonl")),
           "gaia": ("metadata.jsonl", GAIA, lambda folder: read_gaia(folder)),
           "mat": ("mat.json", MAT, lambda folder: read_mat(folder / "mat.json", folder)[0])}


@pytest.mark.parametrize("reader", READERS)
def test_any_bytes_give_tasks_or_one_line(reader, place, capsys):
    from transformers import PreTrainedTokenizerFast
    (name, good, read), rng, accepted = READERS[reader], random.Random(reader), 0
    chat = Chat(PreTrainedTokenizerFast.from_pretrained(TINY_DIR))
    for _ in range(800):
        data, found = mutated(rng, good), []
        (place / name).write_bytes(data)
        status = exit_status(lambda: found.extend(read(place)))
        said = capsys.readouterr()
        if status:
            assert status == 2 and said.err.startswith("error: ") and said.err.count("\n") == 1, (data, said)
            assert len(said.err) < 1000 and not said.out
        accepted += bool(found)
        for task in found:
            assert all(file.resolve().is_relative_to(place) for file in task.files.values())
            assert task.id.isprintable() and task.level.isprintable() and task.question.strip() and task.answer.strip()
            assert task.answer not in ("nan", "inf", "-inf") and build_prompt(chat, task, [], "full")
    assert 80 < accepted < 700


def test_any_parquet_gives_tasks_or_one_line(place, capsys):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install -r requirements-gaia.txt")
    import pyarrow
    file, rng = place / "metadata.parquet", random.Random(0)
    parquet.write_table(pyarrow.Table.from_pylist([GAIA | {"task_id": f"{i}"} for i in range(5)]), file)
    whole = file.read_bytes()
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        file.write_bytes(data[:rng.randrange(len(data))] if rng.random() < 0.1 else data)
        assert exit_status(lambda: read_gaia(place)) in (0, 2)
        assert capsys.readouterr().err.count("\n") <= 1


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret", "link", "linked/passwd", "ok.txt/../../secret"])
def test_no_attachment_lies_outside_unless_the_user_says_so(place, name):
    (place / "t.jsonl").write_text(json.dumps(GOOD | {"files": [name]}))
    (place / "metadata.jsonl").write_text(json.dumps(GAIA | {"file_name": name}))
    for read in (lambda **more: read_jsonl(place / "t.jsonl", **more), lambda **more: read_gaia(place, **more)):
        with pytest.raises(UserError, match=":1: attachment .* it lies outside of .*--allow-outside-files"):
            read()
        if ".txt" not in name:
            [task] = read(allow_outside=True)
            assert not missing_files([task])


def test_the_hubs_own_links_are_no_outside(place, monkeypatch):
    """A snapshot in the hub's cache holds links to blobs beside it."""
    import huggingface_hub
    snapshot, blobs = place / "datasets--gaia" / "snapshots" / "abc", place / "datasets--gaia" / "blobs"
    (snapshot / "2023" / "validation").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "f00").write_text("a file")
    (snapshot / "2023" / "validation" / "a.txt").symlink_to("../../../../blobs/f00")
    (snapshot / "2023" / "validation" / "metadata.jsonl").write_text(json.dumps(GAIA | {"file_name": "a.txt"}))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    [task] = read_gaia("hub")
    assert {name: file.read_text() for name, file in task.files.items()} == {"a.txt": "a file"}


def test_a_byte_order_mark_is_read_and_names_and_numbers_are_checked(place):
    file = place / "t.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert read_jsonl(file)[0].id == "a"
    wrong = [("id", "a\x1b[2J"), ("id", "\ud800"), ("answer", float("nan")), ("answer", float("-inf")), ("level", [1]),
             ("level", True), ("level", {"a": 1}), ("level", "1\n2"), ("family", ["x"]), ("files", ["a\nb"])]
    for key, value in wrong:
        file.write_text(json.dumps(GOOD | {key: value}))
        with pytest.raises(UserError, match=f"t.jsonl:1: {'attachment' if key == 'files' else repr(key)} "):
            read_jsonl(file)
