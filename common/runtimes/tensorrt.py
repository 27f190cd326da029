"""A TensorRT engine: built from an ONNX file, run on images, and the `trtexec` commands that do the same on a device.

By the calls that the documentation of TensorRT 11 gives; 10 works too. Networks are strongly typed: each layer has the
precision of the ONNX file's tensors and Q/DQ nodes, so an fp16 or int8 engine is made from an fp16 or int8 file.
"""

import importlib
import shlex
from pathlib import Path

import onnx
import torch

from common.cli import UserError, refusing
from common.records import write_file, write_json
from common.runtimes.base import Runtime
from common.runtimes.onnxruntime import metadata_of


def import_tensorrt(ready):
    """The module tensorrt, or a UserError; `ready` says what can be done without it."""
    with refusing(
        "TensorRT cannot be imported ({error}). With an NVIDIA GPU: pip install tensorrt (CUDA 13) or tensorrt-cu12 "
        "(CUDA 12), which bring the libraries of the same version; on a Jetson: sudo apt-get install nvidia-jetpack, "
        f"and a virtual environment with --system-site-packages. {ready}"
    ):  # without its libraries it fails in several ways
        return importlib.import_module("tensorrt")


def profile_shapes(onnx_path, batch_sizes):
    """The shapes of the input "images" at these batch sizes, or None where the file fixes its own."""
    batch, *rest = onnx.load(onnx_path, load_external_data=False).graph.input[0].type.tensor_type.shape.dim
    if batch.dim_value:
        return None
    return [(size, *(dim.dim_value for dim in rest)) for size in batch_sizes]


def build_engine(onnx_path, engine_path, opt_batch_size, max_batch_size, workspace_mib, timing_cache=None):
    """Writes the serialized engine of `onnx_path`, and beside it, as `<engine_path>.json`, the file's metadata. A
    UserError tells of no TensorRT, no GPU, or a file that cannot be parsed or built.

    Args:
        opt_batch_size, max_batch_size: the engine takes 1 to max_batch_size images, and its kernels are chosen for
            opt_batch_size. A file of a fixed batch size keeps its own.
        timing_cache: file of kernel timings, read where it is there and written after the build; default `timing.cache`
            beside the engine. It makes another build for this GPU quick.
    """
    timing_cache = Path(timing_cache or Path(engine_path).with_name("timing.cache"))
    command = trtexec_command(onnx_path, engine_path, opt_batch_size, max_batch_size, workspace_mib, timing_cache)
    by_hand = f"{onnx_path} is ready; where trtexec is, this builds the engine too: {shlex.join(command)}"
    trt = import_tensorrt(by_hand)
    logger = trt.Logger(trt.Logger.WARNING)
    with refusing(f"TensorRT {trt.__version__} finds no usable GPU or driver ({{error}}). {by_hand}"):
        builder = trt.Builder(logger)
    strongly_typed = 0  # always so since 11, where the flag is deprecated
    if int(trt.__version__.split(".")[0]) < 11:
        strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strongly_typed)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise UserError(f"TensorRT {trt.__version__} cannot parse {onnx_path}: {errors}")

    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mib << 20)
    shapes = profile_shapes(onnx_path, (1, opt_batch_size, max_batch_size))
    if shapes:
        profile = builder.create_optimization_profile()
        profile.set_shape("images", *shapes)
        config.add_optimization_profile(profile)
    cache = attach_timing_cache(config, timing_cache)  # which has to outlive the build
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise UserError(f"TensorRT {trt.__version__} cannot build {onnx_path}: its messages above say why.")
    write_file(engine_path, engine)
    if cache is not None:
        write_file(timing_cache, cache.serialize())
    write_json(f"{engine_path}.json", metadata_of(onnx_path))


def attach_timing_cache(config, path):
    """Gives the builder's configuration the timing cache of a file, or a new one where there is no such file or it is
    damaged or another GPU's or version's. Returns it, None where TensorRT takes none."""
    for data in ([path.read_bytes()] if path.is_file() else []) + [b""]:
        cache = config.create_timing_cache(data)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
    return None


def trtexec_command(onnx_path, engine_path, opt_batch_size, max_batch_size, workspace_mib, timing_cache):
    """The arguments of the `trtexec` that builds what `build_engine` does. TensorRT 10 needs --stronglyTyped, in 11 it
    does nothing; and no shapes may be given for a file that fixes them."""
    shapes = profile_shapes(onnx_path, (1, opt_batch_size, max_batch_size)) or []
    return [
        "trtexec", f"--onnx={onnx_path}", f"--saveEngine={engine_path}", "--stronglyTyped",
        *(f"--{kind}Shapes={spec(shape)}" for kind, shape in zip(("min", "opt", "max"), shapes)),
        f"--memPoolSize=workspace:{workspace_mib}", f"--timingCacheFile={timing_cache}", "--skipInference",
    ]  # fmt: skip


def trtexec_timing_command(onnx_path, engine_path, batch_size):
    """The arguments of the `trtexec` that times an engine of `onnx_path`: half a second of warming up, then at least
    10 seconds and 200 batches. It prints throughput, and median and percentiles of the latency with and without the
    copies between host and device. With --useCudaGraph beside these, small kernels are launched all at once."""
    shapes = profile_shapes(onnx_path, (batch_size,))
    return [
        "trtexec", f"--loadEngine={engine_path}", *([f"--shapes={spec(shapes[0])}"] if shapes else []), "--warmUp=500",
        "--duration=10", "--iterations=200", "--percentile=90,99",
    ]  # fmt: skip


def spec(shape):
    return f"images:{'x'.join(map(str, shape))}"


class TensorRT(Runtime):
    """An engine that `build_engine` wrote, of the last of the precisions asked for. A UserError tells of no TensorRT,
    no GPU, an engine of another TensorRT version or GPU, or one without its metadata."""

    suffix = ".engine"

    @classmethod
    def build(cls, student):
        source, path, options = list(student.onnx.values())[-1], student.folder / "student.engine", student.options
        cache = Path(options.timing_cache or student.folder / "timing.cache")
        settings = options.opt_batch_size, options.max_batch_size, options.workspace_mib, cache
        print(shlex.join(trtexec_command(source, path, *settings)))
        print(shlex.join(trtexec_timing_command(source, path, options.opt_batch_size)))
        build_engine(source, path, *settings)

    @classmethod
    def sources(cls, student, device):
        return {list(student.onnx)[-1]: student.folder / "student.engine"} if device.type == "cuda" else {}

    def __init__(self, path, device, num_threads=None):
        self.describe_beside(path)
        trt = import_tensorrt(f"The ONNX file that {path} was built from can be measured without it.")
        if device.type != "cuda":
            raise UserError(f"{path}: a TensorRT engine needs an NVIDIA GPU, and PyTorch sees none here.")
        self.runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))  # it and the engine have to outlive the context
        self.engine = self.runtime.deserialize_cuda_engine(Path(path).read_bytes())
        if self.engine is None:
            raise UserError(f"{path} was built by another TensorRT or for another GPU: export it again here.")
        self.context = self.engine.create_execution_context()
        if self.context is None:
            raise UserError(f"{path} does not fit into the GPU's memory: its messages above say what is missing.")
        if not self.fixed:
            self.max_batch_size = self.engine.get_tensor_profile_shape("images", 0)[2][0]
        # On the default stream TensorRT would synchronize the whole device at each call.
        self.device, self.stream = device, torch.cuda.Stream(device)

    def run(self, inputs):
        output = "probabilities" if self.includes_preprocessing else "logits"
        with torch.cuda.stream(self.stream):
            inputs = inputs.to(self.device)
            answers = torch.empty(len(inputs), len(self.classes), device=self.device)
            ready = (
                self.context.set_input_shape("images", tuple(inputs.shape))
                and self.context.set_tensor_address("images", inputs.data_ptr())
                and self.context.set_tensor_address(output, answers.data_ptr())
            )
            if not (ready and self.context.execute_async_v3(self.stream.cuda_stream)):
                raise RuntimeError("TensorRT could not run the engine: its messages above say why.")
            return answers.cpu()  # waits for the stream: until then the engine uses both tensors
