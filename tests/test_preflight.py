"""machinery/preflight.py: what `train.py --check` finds here, on a hub of the test's own, and where something lacks."""
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import constants

import train
from machinery import preflight
from machinery.memory import GIB
from machinery.preflight import Line, disk, find_weights, memory_plan, nf4_kernel, sandbox
from policy import model_config
from train import parse_args


def table(capsys) -> dict[str, Line]:
    """{what: its line} of what was printed."""
    lines = [text.split(None, 2) for text in capsys.readouterr().out.replace("memory plan", "memory-plan").splitlines()]
    return {line[0]: Line(*line) for line in lines if len(line) == 3 and line[1] in ("ok", "warning", "MISSING")}


def settled(*arguments):
    return train.settle(*parse_args([*arguments]))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on loopback with the model someone/model of two shards; its files can be read with the right token only."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            files = {"model-00001-of-00002.safetensors": 3 * GIB, "model-00002-of-00002.safetensors": GIB,
                     "consolidated.safetensors": 4 * GIB, "config.json": 100}
            answer = {"siblings": [{"rfilename": name, "size": size} for name, size in files.items()]}
            status = 200 if "someone/model" in self.path else 404
            if "/resolve/" in self.path and self.headers["authorization"] != "Bearer hf_right":
                status = 403
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def do_HEAD(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    yield
    server.shutdown()
    server.server_close()


def test_the_built_in_model_would_start(tmp_path, capsys):
    assert train.main(["--check", "--out", str(tmp_path / "new" / "out")]) == 0
    found = table(capsys)
    assert list(found) == ["packages", "card", "driver", "bitsandbytes", "sandbox", "weights", "disk", "memory-plan"]
    assert not (tmp_path / "new").exists()                              # it only looks


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card is there")
def test_without_a_card_a_large_model_would_not_start_and_the_table_says_why(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")             # nothing listens there
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert train.main(["--model", "Qwen2.5-7B", "--vram", "24", "--check", "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "card, driver, weights" in captured.err
    assert "no usable GPU" not in captured.err and "finds no usable GPU" in captured.out
    assert "at most 22.0 of 24.0 GiB with 34 slots" in captured.out     # the plan needs no card
    assert "14.2 GiB needed" in captured.out                            # of disk, although the hub is away


def test_a_resumed_run_is_checked_with_its_own_settings(tmp_path, capsys):
    out = str(tmp_path / "out")
    assert train.main(["--steps", "0", "--groups", "2", "--group-size", "2", "--eval-tasks", "1", "--out", out]) == 0
    capsys.readouterr()
    assert train.main(["--resume", "--check", "--out", out]) == 0
    assert "tiny" in table(capsys)["weights"].found


def test_weights_on_the_hub(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    line, download = find_weights("someone/model", 1)
    assert line.state == "ok" and download == 4 * GIB and "4.0 GiB to download" in line.found
    line, download = find_weights("someone/other", 7)
    assert line.state == "MISSING" and download == 7 and "404" in line.found
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    line, _ = find_weights("someone/model", 7)
    assert line.state == "MISSING" and "HF_TOKEN" in line.found and "403" in line.found


def test_weights_in_the_cache_and_in_a_folder(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    repo = tmp_path / "cache" / "hub" / "models--someone--model"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(zip("ab", shards))}))
    (snapshot / shards[0]).write_text("")
    assert find_weights("someone/model", 1)[1] == GIB                   # the second is still to come
    (snapshot / shards[1]).write_text("")
    assert find_weights("someone/model", 1)[1] == 0
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert find_weights("someone/model", 1)[0].state == "ok"            # offline, but whole
    (snapshot / shards[0]).unlink()
    assert find_weights("someone/model", 5) == (find_weights("someone/model", 5)[0], 5)
    assert find_weights("someone/model", 5)[0].state == "MISSING"
    assert find_weights(str(tmp_path), 1)[0].state == "MISSING"         # a folder without weights


def test_a_disk_that_is_too_small(monkeypatch, tmp_path):
    cfg, _ = settled("--model", "Qwen2.5-7B", "--out", str(tmp_path / "out"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    config = model_config(cfg.model)
    for free, state in ((16.5, "ok"), (15.5, "MISSING")):               # 14.2 for the weights, 1.7 for the run
        usage = type("Usage", (), {"free": free * GIB})
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder, usage=usage: usage)
        assert disk(cfg, config, int(14.2 * GIB)).state == state


def test_a_plan_that_does_not_fit_says_what_does():
    line = memory_plan(*settled("--model", "Qwen2.5-14B", "--vram", "12"))
    assert line.state == "MISSING" and "Qwen2.5-7B (--quantize nf4)" in line.found
    assert memory_plan(*settled("--model", "Qwen2.5-14B", "--vram", "24")).state == "ok"


def test_a_sandbox_that_fails_and_a_kernel_that_computes_nonsense(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))                           # where no bwrap is
    assert sandbox("bwrap").state == "MISSING" and "bubblewrap is not installed" in sandbox("bwrap").found
    assert sandbox("auto").state == "warning" and sandbox("none").state == "warning"
    assert nf4_kernel("nf4", 1).state == "ok" and nf4_kernel("none", 1e10).found == "NF4 is not used"
    monkeypatch.setattr(preflight.bitsandbytes.nn.Linear4bit, "forward", lambda layer, x: torch.zeros(4, 512))
    assert nf4_kernel("nf4", 1).state == "MISSING" and "wrong by" in nf4_kernel("nf4", 1).found
