"""Attention of OpenVINO and ONNX Runtime, where they are installed (the extra "bench"), in the layout that each likes best."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from timing import Run
from torch import Tensor

KINDS = ("full", "causal")


def openvino(kind: str, tensors: tuple[Tensor, Tensor, Tensor]) -> Run | None:
    """ScaledDotProductAttention of dense (batch, heads, length, features). In bfloat16 inputs are float32, as its users have
    them, and it computes in bfloat16. None where it is not installed, or cannot say the case.
    """
    dtype = {torch.float32: "f32", torch.bfloat16: "bf16"}.get(tensors[0].dtype)
    if find_spec("openvino") is None or kind not in KINDS or dtype is None:
        return None
    import numpy as np
    import openvino as ov
    from openvino import opset13

    dense = [t.float().contiguous() for t in tensors]
    parameters = [opset13.parameter(list(t.shape), np.float32) for t in dense]
    model = ov.Model([opset13.scaled_dot_product_attention(*parameters, causal=kind == "causal")], parameters)
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": dtype}
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    arrays = [t.numpy() for t in dense]  # whose memory the request reads, and does not own
    for i, array in enumerate(arrays):
        request.set_input_tensor(i, ov.Tensor(array, shared_memory=True))

    def run(arrays: object = arrays) -> Tensor:
        request.infer()
        return torch.from_numpy(request.get_output_tensor(0).data)

    return run


def onnxruntime(kind: str, tensors: tuple[Tensor, Tensor, Tensor]) -> Run | None:
    """com.microsoft.MultiHeadAttention of dense (batch, length, heads * features), which has no bfloat16 on CPUs."""
    available = find_spec("onnxruntime") is not None and find_spec("onnx") is not None
    if not available or kind not in KINDS or tensors[0].dtype != torch.float32:
        return None
    import onnxruntime as ort
    from onnx import TensorProto, helper

    heads, width = tensors[0].shape[1], tensors[0].shape[3]
    given = {name: t.transpose(1, 2).flatten(2).contiguous() for name, t in zip("qkv", tensors, strict=True)}
    options = {"domain": "com.microsoft", "num_heads": heads, "unidirectional": int(kind == "causal")}
    node = helper.make_node("MultiHeadAttention", [*given], ["out"], **options)
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(t.shape)) for name, t in given.items()]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, list(given["q"].shape))
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "attention", inputs, [out]), opset_imports=imports, ir_version=9)
    chosen = ort.SessionOptions()
    chosen.intra_op_num_threads, chosen.inter_op_num_threads = torch.get_num_threads(), 1
    session = ort.InferenceSession(model.SerializeToString(), chosen, providers=["CPUExecutionProvider"])
    arrays = {name: t.numpy() for name, t in given.items()}

    def run() -> Tensor:
        return torch.from_numpy(session.run(None, arrays)[0]).unflatten(-1, (heads, width)).transpose(1, 2)

    return run
