"""The engines: siblings behind the interface of `base`. Each is imported only where it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from resplit.errors import ModelError
from resplit.model.engines.base import Engine
from resplit.model.spec import ModelSpec
from resplit.types import Device, EngineChoice

if TYPE_CHECKING:
    from resplit.model.engines.torch.engine import TorchEngine

# What a node that runs the ONNX engine may name as its device.
ONNX_DEVICES: tuple[Device, ...] = ("auto", "cpu")


def preload(choice: EngineChoice) -> None:
    """Import an engine's library: later the import would keep the event loop from answering for a second or more."""
    if choice == "torch":
        _import_torch()
    else:
        import resplit.model.engines.onnx.engine  # noqa: F401


def open_engine(spec: ModelSpec, threads: int = 1, device: Device = "auto") -> Engine[Any]:
    """An engine for the blocks of this model, without any block yet.

    `threads` holds for all engines of the process; the first one sets it. ModelError if the engine cannot compute on
    `device`, or this machine has none.
    """
    if spec.engine == "onnx":
        if device not in ONNX_DEVICES:
            raise ModelError(f"the onnx engine computes on {ONNX_DEVICES[-1]}, not on {device}; set `engine: torch`")
        from resplit.model.engines.onnx.engine import OnnxEngine

        return OnnxEngine(spec, threads)
    return _import_torch()(spec, threads, device)


def _import_torch() -> type[TorchEngine]:
    """The torch engine; ModelError where its libraries are not installed."""
    try:
        from resplit.model.engines.torch import engine
    except ModuleNotFoundError as error:
        raise ModelError(f"the torch engine needs {error.name}; install resplit[torch] on this node") from None
    return engine.TorchEngine
