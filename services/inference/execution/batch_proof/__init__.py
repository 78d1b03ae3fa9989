"""Proves from an ONNX graph that the rows of a batch are computed independently; see docs/decisions/0024."""
