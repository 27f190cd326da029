"""Building a TensorRT engine from an ONNX file, by TensorRT 11's documented calls (10 works too).

TensorRT 11 builds strongly typed networks only: the precision of each layer is that of the ONNX file's tensors and
Q/DQ nodes, so an fp16 or int8 engine is made from an fp16 or int8 file.
"""

from pathlib import Path

from common.cli import UserError, whole_file


def build_engine(onnx_path, engine_path, input_shape, max_batch_size, workspace_mib):
    """Writes the serialized engine of `onnx_path` for batches of 1 to `max_batch_size`.

    Args:
        input_shape: (channels, height, width) of the input "images".
    Raises:
        UserError: TensorRT is not installed, no GPU, or the file cannot be parsed or built.
    """
    try:
        import tensorrt as trt
    except Exception as error:  # the bindings without their libraries fail in several ways
        raise UserError(
            f"TensorRT cannot be imported ({error}). On a machine with an NVIDIA GPU: pip install tensorrt "
            f"(see NVIDIA's installation guide). {onnx_path} is ready for it."
        ) from error
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
