"""Writes tasks as a folder in GAIA's layout, for the tests of whatever reads one."""
import json
from pathlib import Path

from tasks import Task


def export_gaia(tasks: list[Task], folder: Path) -> None:
    """Write tasks with at most one attachment each: folder/2023/validation/metadata.jsonl, the files beside it."""
    out = folder / "2023" / "validation"
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for task in tasks:
        file_name = ""
        for name, content in task.files.items():
            file_name = f"{task.id}/{name}"     # GAIA: <task_id>.csv; ours keep the name that the question uses
            (out / task.id).mkdir(exist_ok=True)
            (out / file_name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        lines.append(json.dumps({"task_id": task.id, "Question": task.question, "Level": task.level,
                                 "Final answer": task.answer, "file_name": file_name}) + "\n")
    (out / "metadata.jsonl").write_text("".join(lines))
