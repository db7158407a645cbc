"""Exporters to ONNX and TensorRT, with the runners for what they write; installed as `vte_compile.export`."""
