"""The ONNX Runtime engine: quantised, batched, and exact over any split."""

import os

# Before the runtime is imported: its builds for Linux would tell their maker what runs, and on what machine.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
