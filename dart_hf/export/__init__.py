"""Export a model to ONNX or to PyTorch's own export format."""

from dart_hf.export.exporting import Export, export_model

__all__ = ["Export", "export_model"]
