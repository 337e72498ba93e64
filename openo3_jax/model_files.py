"""The files of a Hugging Face directory beside its weights, and a directory that appears whole or not at all."""

import json
import shutil
import tempfile
from pathlib import Path

from openo3_jax.errors import InputError

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf")


def check_new(out: Path) -> None:
    """Raises: InputError unless `out` can become a new directory: it is missing, or empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists and is not an empty directory; choose another place")


class new_directory:
    """`with new_directory(out) as staging:` fills a sibling of `out` that takes its name on success, else vanishes."""

    def __init__(self, out: Path):
        self.out = out

    def __enter__(self) -> Path:
        check_new(self.out)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.staging = Path(tempfile.mkdtemp(prefix=f".{self.out.name}-", dir=self.out.parent))
        return self.staging

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self.staging)
            return
        self.staging.chmod(0o755)
        if self.out.exists():
            self.out.rmdir()
        self.staging.rename(self.out)


def copy_model_files(source: Path, target: Path) -> None:
    """Copy everything of a model directory but its weights, byte for byte."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith(".") and not any(map(file.match, WEIGHT_FILES)):
            shutil.copyfile(file, target / file.name)


def write_dtype(file: Path, dtype: str) -> None:
    """Say in a `config.json` in which dtype the weights are stored."""
    config = json.loads(file.read_text())
    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        for name in ("dtype", "torch_dtype"):
            if name in part:
                part[name] = dtype
    config.setdefault("torch_dtype" if "dtype" not in config else "dtype", dtype)
    file.write_text(json.dumps(config, indent=2) + "\n")
