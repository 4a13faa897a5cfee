"""The ONNX Runtime engine: quantised, batched, and exact over any split."""
