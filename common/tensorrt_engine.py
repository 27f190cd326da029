"""A TensorRT engine: built from an ONNX file, and run on images, by TensorRT 11's documented calls (10 works too).

TensorRT 11 builds strongly typed networks only: the precision of each layer is that of the ONNX file's tensors and
Q/DQ nodes, so an fp16 or int8 engine is made from an fp16 or int8 file.
"""

import json
from pathlib import Path

import onnx
import torch

from common.cli import UserError, read_json, whole_file, write_json
from common.models import normalize


def import_tensorrt(ready):
    """The module tensorrt; `ready` names what could be done without it.

    Raises:
        UserError: it is not installed or finds no GPU.
    """
    try:
        import tensorrt
    except Exception as error:  # the bindings without their libraries fail in several ways
        raise UserError(
            f"TensorRT cannot be imported ({error}). On a machine with an NVIDIA GPU: pip install tensorrt "
            f"(see NVIDIA's installation guide). {ready}"
        ) from error
    return tensorrt


def build_engine(onnx_path, engine_path, input_shape, max_batch_size, workspace_mib):
    """Writes the serialized engine of `onnx_path` for batches of 1 to `max_batch_size`, and beside it, as
    `<engine_path>.json`, the ONNX file's metadata.

    Args:
        input_shape: (channels, height, width) of the input "images".
    Raises:
        UserError: TensorRT is not installed, no GPU, or the file cannot be parsed or built.
    """
    trt = import_tensorrt(f"{onnx_path} is ready for it.")
    logger = trt.Logger(trt.Logger.WARNING)
    try:
        builder = trt.Builder(logger)
    except Exception as error:
        raise UserError(f"TensorRT {trt.__version__} finds no usable GPU ({error}). {onnx_path} is ready.") from error
    strongly_typed = 0  # always so since 11
    if int(trt.__version__.split(".")[0]) < 11:
        strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strongly_typed)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise UserError(f"TensorRT cannot parse {onnx_path}: {errors}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mib << 20)
    profile = builder.create_optimization_profile()
    profile.set_shape("images", (1, *input_shape), (1, *input_shape), (max_batch_size, *input_shape))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise UserError(f"TensorRT cannot build an engine of {onnx_path}: its messages above say why.")
    with whole_file(engine_path) as path:
        Path(path).write_bytes(engine)
    metadata = {entry.key: entry.value for entry in onnx.load(onnx_path, load_external_data=False).metadata_props}
    write_json(f"{engine_path}.json", metadata | {"max_batch_size": max_batch_size})


class EngineClassifier:
    """Callable like the PyTorch model: images [B, 3, H, W] in [0, 1], on the GPU, to logits [B, num_classes].

    Raises:
        UserError: no TensorRT, no GPU, or an engine of another TensorRT version or GPU.
    """

    def __init__(self, path, device):
        facts = Path(f"{path}.json")
        if not facts.is_file():
            raise UserError(f"{facts} is missing: export.py writes it beside the engine.")
        metadata = read_json(facts)
        self.pretrained_cfg, self.classes = (json.loads(metadata[key]) for key in ("preprocessing", "classes"))
        self.max_batch_size = metadata["max_batch_size"]
        trt = import_tensorrt(f"The ONNX file beside {path} can be measured without it.")
        if device.type != "cuda":
            raise UserError(f"{path}: a TensorRT engine needs an NVIDIA GPU, and none is to be seen here.")
        self.engine = trt.Runtime(trt.Logger(trt.Logger.WARNING)).deserialize_cuda_engine(Path(path).read_bytes())
        if self.engine is None:
            raise UserError(f"{path} was built by another TensorRT or for another GPU: export it again here.")
        self.context = self.engine.create_execution_context()

    def __call__(self, images):
        return torch.cat([self.run(normalize(self, part)) for part in images.split(self.max_batch_size)])

    def run(self, inputs):
        """Normalised images [B, 3, h, w] to logits [B, num_classes], B at most the engine's largest batch."""
        inputs = inputs.float().contiguous()
        logits = torch.empty(len(inputs), len(self.classes), device=inputs.device)
        self.context.set_input_shape("images", tuple(inputs.shape))
        self.context.set_tensor_address("images", inputs.data_ptr())
        self.context.set_tensor_address("logits", logits.data_ptr())
        if not self.context.execute_async_v3(torch.cuda.current_stream(inputs.device).cuda_stream):
            raise RuntimeError("TensorRT could not run the engine: its messages above say why.")
        return logits
