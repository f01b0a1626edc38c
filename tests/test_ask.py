"""ask.py, as a person uses it: questions on the command line, from stdin and in a terminal; bad input; Ctrl-C."""
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ask
from rollout import rollout

ROOT = Path(__file__).parent.parent
QUESTION = "What is the population of Kavodu?"


def test_the_turns_then_the_answer(capsys):
    assert ask.main([QUESTION]) == 0
    out, _ = capsys.readouterr()
    assert "```python\n" in out and "Observation (" in out
    last = out.splitlines()[-1]
    assert last.startswith("answer: ")
    assert ask.main(["--quiet", QUESTION]) == 0
    assert capsys.readouterr().out == last.removeprefix("answer: ") + "\n"


def test_it_is_the_trajectory_of_training(capsys, monkeypatch):
    kept = []

    def keeping(*args, **kwargs):
        kept.append(rollout(*args, **kwargs))
        return kept[-1]
    monkeypatch.setattr(ask, "rollout", keeping)
    assert ask.main(["--temperature", "1", "--seed", "3", QUESTION]) in (0, 1)
    out = capsys.readouterr().out
    turns = kept[0][0][0].turns
    at = [out.index(turn.text.strip()) for turn in turns]
    assert turns and at == sorted(at)
    assert all(turn.observation.strip() in out for turn in turns)


def test_a_file_is_attached(tmp_path, capsys):
    (tmp_path / "shop.csv").write_text("item,volume,size\nBolori,58,42\nKavodu,3,100\n")
    assert ask.main(["--file", str(tmp_path / "shop.csv"), "What is the largest size in shop.csv?"]) in (0, 1)
    assert "No such file" not in capsys.readouterr().out


@pytest.mark.parametrize("arguments, why", [
    (["--ckpt", "FOLDER", "x"], "no adapter"),
    (["--file", "FOLDER/absent.csv", "x"], "no such file"),
    (["--file", "FOLDER/a/t.csv", "--file", "FOLDER/b/t.csv", "x"], "one name"),
    (["--tools", "absent.py", "x"], "no such file"),
    (["x" * 100_000], "the context holds"),
    (["--temperature", "-1", "x"], "--temperature"),
    (["--sandbox", "paper", "x"], "--sandbox"),
    (["what", "is", "it"], "unrecognized")])
def test_bad_input_is_one_line(arguments, why, tmp_path, capsys):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "t.csv").write_text("x\n")
    assert ask.main([argument.replace("FOLDER", str(tmp_path)) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert why in lines[-1] and lines[-1].startswith("error: ")


def test_what_a_model_writes_cannot_rewrite_the_terminal():
    assert ask.shown("a\x1b[2J\x9b\r\u202eb\n\tc\ud800") == "a?[2J???b\n\tc?"


def run(*arguments, stdin=None):
    command = [sys.executable, str(ROOT / "ask.py"), *arguments]
    return subprocess.run(command, input=stdin, text=True, capture_output=True, timeout=300)


def test_questions_from_stdin_and_no_answer():
    done = run("--quiet", stdin=f"{QUESTION}\n\nWhat is the area of Bolori?\n")
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr
    assert len(done.stdout.splitlines()) + done.stderr.count("no answer: ") == 2


def test_closed_stdin():
    for arguments, status in (([], 2), (["--quiet", QUESTION], 0)):
        command = [sys.executable, str(ROOT / "ask.py"), *arguments]
        done = subprocess.run(command, text=True, capture_output=True, timeout=300, preexec_fn=lambda: os.close(0))
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr and "NO SANDBOX: bwrap fails" not in done.stderr


def test_in_a_terminal():
    """Three questions, each answered before the next; then Ctrl-C while it waits: one line, 130."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, str(ROOT / "ask.py")])
    seen = ""

    def read_until(text: str, times: int = 1):
        nonlocal seen
        until = time.monotonic() + 200
        while seen.count(text) < times:
            assert time.monotonic() < until, seen
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 65536).decode()
    read_until("one question per line")
    for n in (1, 2, 3):
        os.write(terminal, QUESTION.encode() + b"\n")
        read_until("answer: ", n)
    time.sleep(1)                   # until it waits: Python sees a Ctrl-C just before a read only after it
    os.write(terminal, b"\x03")
    read_until("interrupted")
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 130 and "Traceback" not in seen


def test_interrupted_while_it_answers():
    process = subprocess.Popen([sys.executable, str(ROOT / "ask.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    process.stdin.write((QUESTION + "\n") * 1000)
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("Observation"):
            break
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 130 and "Traceback" not in out and "interrupted" in out
