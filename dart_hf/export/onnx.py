"""Write and read ONNX, `model.onnx`, and let its linear layers compute in 8 bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dart_hf.export.onnx_scan import replace_scans

FILE_NAME = "model.onnx"
# Packages beyond the core that the format needs: the extra `export`.
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# The linear layers of these modules stay in float32.
IN_FLOAT32 = (".tokenizer", ".forward_scan", ".backward_scan")


def write_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a traced model to a file. The scans of a Vision Mamba must be traced inside [`scans_as_nodes`]."""
    import onnx

    names: dict[str, Any] = {"input_names": ["pixel_values"], "output_names": ["logits"]}
    # The program has a dynamic batch size already; this gives it a name.
    names["dynamic_shapes"] = {"pixel_values": {0: "batch"}}
    written = torch.onnx.export(program, dynamo=True, verbose=False, **names).model_proto
    replace_scans(written)
    onnx.save(written, path)


def read_program(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """The program in a file as a function: pixel_values -> logits."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda pixel_values: torch.from_numpy(session.run(["logits"], {"pixel_values": pixel_values.numpy()})[0])


def quantize_encoder(path: Path) -> None:
    """Let the encoder's linear layers in a file compute in 8 bits.

    Each output of a layer has its own scale: one scale for the whole layer is slower and has twice the error.

    Raises:
        ValueError: The program has no linear layer of the encoder.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    program = onnx.load(path)
    # onnxruntime wants constants folded and shapes inferred, which torch's exporter has done. This says so.
    add_pre_process_metadata(program)
    constants = {constant.name for constant in program.graph.initializer}
    layers = [
        node.name
        for node in program.graph.node
        if node.op_type == "MatMul" and node.input[1] in constants and _is_in_encoder(node)
    ]
    if not layers:
        # onnxruntime would take an empty list for all layers.
        raise ValueError("int8 finds no linear layer of the encoder in the program; export in float32.")
    quantize_dynamic(program, path, per_channel=True, weight_type=QuantType.QInt8, nodes_to_quantize=layers)


def _is_in_encoder(node: Any) -> bool:
    """Tell if an ONNX node comes from a layer of the encoder. torch records the modules that a node comes from.

    The scans of a Vision Mamba are left out: small time steps decide how far back a state remembers.
    """
    modules = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "")
    is_layer = any(part in modules for part in (".layers.", ".layer.", ".blocks."))
    return is_layer and not any(part in modules for part in IN_FLOAT32)
