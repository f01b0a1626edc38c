"""The report page of a training run or of an evaluation: report.html, one file, to be opened by a double click.

    python report.py out/            # a run, while it goes on or afterwards
    python report.py eval_out/       # an evaluation

Owns what the page holds; how it looks and what it does when clicked: machinery/report.html. train.py keeps the page up
to date while a run goes on (`refresh`), eval_gaia.py writes it at its end. Read in this order: `write`, `training`,
`evaluation`, `fill` (what a large run leaves out), `token_columns`.

All texts in the page were written by a model or by a web page, so they are hostile. Three protections: the data are
JSON in which <, > and & are escaped, so no text can end its element (`escaped`); the page's script makes text nodes of
them, never markup; and the content security policy allows the one script and the one style sheet whose hashes it
names, and no request to anywhere.
"""
import base64
import builtins
import hashlib
import json
import math
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from machinery.cli import OneLineParser, UserError, exit_status
from machinery.statistics import wilson
from tasks import HARD, HIDDEN

TEMPLATE = Path(__file__).parent / "machinery" / "report.html"
BUDGET = 6_000_000                  # characters of texts and tokens in a page; the rest of the page comes on top
LONGEST = 100_000                   # characters of one text; of a longer one the middle is left out
CALL = re.compile(r"(?<![\w.])([A-Za-z_]\w{0,60})\(")
DEFINED = re.compile(r"\b(?:def|class|import|as)[ ]+(\w+)")


# ------------------------------------------------------------------------------------------------------ the file
def write(out: Path) -> Path:
    """Make out/report.html anew, in one step: a reader never sees half a page."""
    if (out / "settings.json").is_file():
        data = evaluation(out)
    elif (out / "run.json").is_file():
        data = training(out)
    else:
        raise UserError(f"{out}: no run.json of train.py and no settings.json of eval_gaia.py in this folder")
    page, part = out / "report.html", out / "report.html.partial"
    part.write_text(html(data | {"folder": str(out), "written": time.strftime("%Y-%m-%d %H:%M")}), encoding="utf-8")
    os.replace(part, page)
    return page


def html(data: dict) -> str:
    """The template with its data, and with the hashes of its script and its style in the content security policy."""
    template = TEMPLATE.read_text(encoding="utf-8")
    for tag in ("script", "style"):
        content = template.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        template = template.replace(f"{{{{hash of the {tag}}}}}", f"'sha256-{digest}'")
    return template.replace("{{data}}", escaped(data))


def escaped(data) -> str:
    """JSON in pure ASCII that can stand inside <script>: it holds no <, > or &, U+2028 is written as an escape."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def refresh(run):
    """After an evaluation and every tenth step: the page of a run that goes on (run: train.Run).

    It takes at most a twentieth of the run's time, the last page apart; a failure is told and never ends the run.
    """
    metrics, began = run.history[-1], time.monotonic()
    due = "heldout_greedy" in metrics or metrics["step"] % 10 == 0
    in_time = run.report_seconds <= run.elapsed() / 20 or run.ended
    if not (run.main and due and in_time):
        return
    try:
        write(run.out)
    except Exception as error:                          # whatever it is: the run is worth more than its page
        run.say(f"  no report.html: {type(error).__name__}: {error}; python report.py {run.out} tries again")
    run.report_seconds += time.monotonic() - began


# -------------------------------------------------------------------------------------------------------- the data
def training(out: Path) -> dict:
    """What the page of a training run holds."""
    settings = json.loads((out / "run.json").read_text())
    metrics = [row for _, row in lines(out / "metrics.jsonl")]
    groups: dict[tuple, dict] = {}
    places, rows = [], {}           # (offset in the file, row, group); key of a trajectory -> (row, group)
    for offset, line in lines(out / "trajectories.jsonl"):
        key = (line["step"], line["task"], line["seed"])
        group = groups.setdefault(key, group_of(line, line["step"], line["expected"], family=line.get("family", "")))
        reward = line["reward"]
        row = row_of(line) | {
            "outcome": {None: "unjudged", 1: "right"}.get(reward["answer"], "wrong"),
            "reward": [rounded(reward[name]) for name in ("total", "answer", "execution")],
            "advantage": rounded(line["advantage"])}
        group["rows"].append(row)
        places.append((offset, row, group))
        rows[*key, row["sample"]] = row, group
    for line in metrics:
        for use in line.get("replayed_groups", []):
            if group := groups.get((use["step"], use["task"], use["seed"])):
                group["replayed"].append(line["step"])
    mark_best_and_worst(groups.values())
    kept = []
    for offset, line in lines(out / "tokens.jsonl"):
        if found := rows.get((line["sampled"], line["task"], line["seed"], line["sample"])):
            kept.append((offset, *found))
    config = settings["config"]
    return {
        "kind": "training", "model": settings["model"], "steps": config["steps"], "metrics": metrics,
        "families": families(metrics, () if config.get("data") else HARD),
        "settings": compared(config, settings.get("defaults", {})), "groups": list(groups.values()),
        "filters": ["family", "step", "outcome", "stop", "tool"],
        **fill(out / "trajectories.jsonl", places, out / "tokens.jsonl", kept, config.get("truncation", 2.0))}


def evaluation(out: Path) -> dict:
    """What the page of an evaluation holds."""
    settings, results = json.loads((out / "settings.json").read_text()), out / "results.json"
    groups: dict[str, dict] = {}
    places = []
    for offset, line in lines(out / "trajectories.jsonl"):
        group = groups.setdefault(line["task_id"], group_of(
            line, 0, line["gold"], level=line["level"], attachment=line["attachment"]))
        outcome = "right" if line["official"] else "wrong"
        row = row_of(line["trajectory"]) | {
            "outcome": "unjudged" if line["gold"] == HIDDEN else outcome, "sample": line["sample"],
            "answer": cut(line["answer"]), "category": cut(line["category"]), "heuristic": cut(line["heuristic"]),
            "llm": line["llm"]}
        group["rows"].append(row)
        places.append((offset, row, group))
    file = out / "trajectories.jsonl"
    return {
        "kind": "evaluation", "model": settings["model"], "settings": compared(settings, {}),
        "results": json.loads(results.read_text()) if results.is_file() else None, "groups": list(groups.values()),
        "filters": ["level", "attachment", "category", "stop", "tool"], **fill(file, places, file, places, 2.0)}


def group_of(line: dict, step: int, expected: str, **more: str) -> dict:
    """One question, without its trajectories."""
    return {"step": step, "task": cut(line["task_id"]), "question": cut(line["question"]), "expected": cut(expected),
            "replayed": [], "rows": [], **{name: cut(value) for name, value in more.items()}}


def row_of(trajectory: dict) -> dict:
    """One trajectory, without its texts and tokens."""
    code = "\n".join(step["code"] or "" for step in trajectory["steps"])
    called = set(CALL.findall(code)) - set(DEFINED.findall(code)) - set(dir(builtins))
    return {"sample": trajectory["sample"], "answer": cut(trajectory["answer"]), "stop": cut(trajectory["stop_reason"]),
            "error": cut(trajectory.get("error", "")), "tool": sorted(called)[:20], "turns": None, "tokens": []}


def mark_best_and_worst(groups: Iterable[dict]):
    """Of each step the trajectory with the highest and the one with the lowest reward; of equals, by the advantage."""
    steps: dict[int, list[dict]] = {}
    for group in groups:
        steps.setdefault(group["step"], []).extend(row for row in group["rows"] if row["advantage"] is not None)
    for rows in steps.values():
        ranked = sorted(rows, key=lambda row: (row["reward"][0], row["advantage"]))
        for row, mark in zip(ranked[:1] + ranked[-1:], ("worst", "best")):
            row["mark"] = mark


def families(metrics: list[dict], hard: Iterable[str]) -> list[dict]:
    """Held-out accuracy per family in the first and in the last evaluation, [share, its 95 % interval] each."""
    measured = [line["heldout_families"] for line in metrics if "heldout_families" in line]
    if not measured:
        return []
    before, after = measured[0], measured[-1]

    def shares(found: list[dict], name: str) -> list | None:
        found = [family for family in found if family.get(name) is not None]
        n = sum(family["n"] for family in found)
        right = sum(family[name] * family["n"] for family in found)
        return [rounded(x) for x in (right / n, *wilson(right, n))] if n else None

    def figures(label: str, members: list[str]) -> dict:
        old, new = [before[f] for f in members if f in before], [after[f] for f in members]
        return {"family": cut(label), "hard": members[0] in hard, "n": sum(family["n"] for family in new),
                **{name: [shares(old, name), shares(new, name)] for name in ("greedy", "sampled", "pass@8")}}
    parts = {f"all {'core ' if hard else ''}families": [name for name in after if name not in hard],
             "all hard families": [name for name in after if name in hard]}
    together = [figures(label, members) | {"together": True} for label, members in parts.items() if members]
    return together + [figures(name or "(no family)", [name]) for name in after]


def compared(config: dict, defaults: dict) -> list[list]:
    """[name, value] of each setting; [name, value, default] where the two differ."""
    differ = {name for name in config if name in defaults and defaults[name] != config[name]}
    return [[name, value] + ([defaults[name]] if name in differ else []) for name, value in config.items()]


# -------------------------------------------------------------------------------- texts and tokens, within a budget
def fill(texts: Path, places: list[tuple], tokens: Path, kept: list[tuple], truncation: float) -> dict:
    """Put texts into the rows, and tokens beside them, until BUDGET is used: the most telling trajectories first.

    places, kept: (offset of a line in the file `texts` or `tokens`, row, group). truncation: C of equation (5).
    """
    last = max((group["step"] for _, _, group in places), default=0)

    def importance(place: tuple) -> tuple:
        """The best and the worst of each step, the first step and the last, every tenth, the rest."""
        _, row, group = place
        told = ("mark" in row, group["step"] in (1, last), group["step"] % 10 == 0, True)
        return told.index(True), row["sample"], group["step"]
    uses: dict[int, list[int]] = defaultdict(list)       # of each row the offsets of its lines in `tokens`
    for offset, row, _ in kept:
        uses[id(row)].append(offset)
    used, records, vocabulary = 0, [], {}
    for offset, row, _ in sorted(places, key=importance):
        line = line_at(texts, offset)
        turns = [{"text": cut(turn["text"]), "observation": cut(turn["observation"]), "status": cut(turn["status"]),
                  "seconds": rounded(turn["seconds"])} for turn in line.get("trajectory", line)["steps"]]
        size = len(json.dumps(turns))
        if used + size <= BUDGET:
            used, row["turns"] = used + size, turns
        for where in uses[id(row)]:
            line = line_at(tokens, where)
            record = token_columns(line | line.get("trajectory", {}), truncation)
            size = len(json.dumps(record))
            if used + size <= BUDGET:
                used += size
                row["tokens"].append(len(records))
                records.append(record)
                vocabulary |= dict(zip(record["ids"], line.get("texts", [])))
    return {"tokens": records, "vocabulary": vocabulary, "not_shown": {
        "trajectories": len(places), "texts": sum(row["turns"] is not None for _, row, _ in places),
        "tokens": sum(bool(row["tokens"]) for _, row, _ in places)}}


def line_at(file: Path, offset: int) -> dict:
    with file.open("rb") as opened:
        opened.seek(offset)
        return parsed(opened.readline())


def token_columns(line: dict, truncation: float) -> dict:
    """The tokens of one trajectory. `sampled`: the places of the sampled ones; the columns have a number for each.

    r (4), c (5) and k (7) are computed here from the log-probs, as grpo.py computes them.
    """
    sampled = [i for i, bit in enumerate(line["mask"]) if bit]
    columns = {"behaviour": [line["logps"][i] for i in sampled]}
    for key in ("now", "old", "ref", "entropy"):
        if line.get(key):
            columns[key] = [line[key][i] for i in sampled]
    if "now" in columns:
        l, l_old, l_behaviour = columns["now"], columns["old"], columns["behaviour"]
        columns["ratio"] = [ratio(a, b) for a, b in zip(l, l_old)]
        columns["weight"] = [ratio(a, b, math.log(truncation)) for a, b in zip(l_old, l_behaviour)]
        if "ref" in columns:
            columns["kl"] = [k3(a, b) for a, b in zip(columns["ref"], l)]
    return {"step": line.get("step", 0), "ids": line["ids"], "sampled": sampled,
            **{key: [rounded(x) for x in values] for key, values in columns.items()}}


def ratio(above: float | None, below: float | None, most: float = 20.0) -> float | None:
    """exp(above - below) as in (4) and (5); None where one of them is not finite."""
    return None if above is None or below is None else math.exp(max(-20.0, min(above - below, most)))


def k3(ref: float | None, l: float | None) -> float | None:
    """Equation (7)."""
    if ref is None or l is None:
        return None
    d = ref - l
    near = min(d, 5.0)
    return math.exp(near) - near - 1 + (math.exp(5.0) - 1) * (d - near)


# --------------------------------------------------------------------------------------------------- small helpers
def lines(file: Path) -> Iterator[tuple[int, dict]]:
    """(offset, row) of each whole line; a kill may have left half of one at the end. No file: no lines."""
    offset = 0
    for line in file.open("rb") if file.exists() else ():
        if line.endswith(b"\n"):
            try:
                yield offset, parsed(line)
            except ValueError as error:
                raise UserError(f"{file}, byte {offset}: not a line of JSON ({error}); remove it") from error
        offset += len(line)


def parsed(line: bytes) -> dict:
    """JSON; a number that is not finite becomes None, which the page shows as not measured."""
    return json.loads(line, parse_constant=lambda name: None)


def cut(text: str | None) -> str | None:
    """A text without the middle of what is longer than LONGEST."""
    if text is None or len(text := str(text)) <= LONGEST:
        return text
    half, out = LONGEST // 2, len(text) - LONGEST
    return f"{text[:half]}\n[... {out} characters left out of this page ...]\n{text[-half:]}"


def rounded(x: float | None) -> float | None:
    """To six digits, which is more than the page shows."""
    return None if x is None else float(f"{x:.6g}")


def command(argv=None):
    parser = OneLineParser(prog="report.py", allow_abbrev=False, description="Write the report page of a run.")
    parser.add_argument("out", type=Path, help="folder that train.py or eval_gaia.py wrote")
    page = write(parser.parse_args(argv).out)
    print(f"written: {page} ({page.stat().st_size / 1e6:.1f} MB); open it with a browser")


def main(argv=None) -> int:
    return exit_status(lambda: command(argv))


if __name__ == "__main__":
    sys.exit(main())
