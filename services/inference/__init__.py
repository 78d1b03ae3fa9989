"""The inference worker: ONNX Runtime behind dynamic batching."""
