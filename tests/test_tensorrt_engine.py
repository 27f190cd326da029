"""The engine's build and inference against a stand-in for TensorRT, which runs the ONNX file in ONNX Runtime and has
documented names only: a call of another name, or of one that TensorRT 11 removed, fails."""

import contextlib
import ctypes
import json
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from common.cli import UserError
from common.runtimes import tensorrt
from common.runtimes.onnxruntime import OnnxRuntime

API = json.loads((Path(__file__).parent / "data" / "tensorrt_api.json").read_text())["classes"]
STREAM = 4711  # a handle that is not the default stream's, which is 0
# Of `trtexec --help`, TensorRT 10.13 and later.
TRTEXEC_OPTIONS = set(
    "onnx saveEngine loadEngine stronglyTyped minShapes optShapes maxShapes shapes memPoolSize timingCacheFile "
    "skipInference warmUp duration iterations percentile".split()
)


class Documented(type):
    """A class that has the names of TensorRT's class of its name, and of these the ones that it defines."""

    def __new__(cls, name, bases, members):
        unknown = {member for member in members if not member.startswith("_")} - set(API[name])
        assert not unknown, f"tensorrt.{name} has no {unknown}"
        return super().__new__(cls, name, bases, members)

    def __getattr__(cls, name):
        raise AttributeError(f"tensorrt.{cls.__name__} has no {name}, or this stand-in lacks it")


class Cuda(str):
    """A torch device that says that it is a GPU."""

    type = "cuda"


def fake_tensorrt(version="11.4.0", gpu="a", parses=True, builds=True):
    """The module tensorrt of a version on a GPU of kind `gpu` (None: none), and the list of calls made to it."""
    calls = []

    class Logger(metaclass=Documented):
        WARNING = 2

        def __init__(self, min_severity):
            assert min_severity == self.WARNING

    class NetworkDefinitionCreationFlag(metaclass=Documented):
        STRONGLY_TYPED = 0 if version.startswith("11") else 1

    class MemoryPoolType(metaclass=Documented):
        WORKSPACE = 0

    class BuilderFlag(metaclass=Documented):
        TF32 = 6

    class INetworkDefinition(metaclass=Documented):
        pass

    class IHostMemory(bytes, metaclass=Documented):
        pass

    class ParserError(metaclass=Documented):
        def __init__(self, text):
            self._text = text

        def desc(self):
            return self._text

    class OnnxParser(metaclass=Documented):
        def __init__(self, network, logger):
            assert isinstance(network, INetworkDefinition) and isinstance(logger, Logger)
            self._network, self._errors = network, []

        def parse_from_file(self, model):
            assert type(model) is str
            self._network._model = Path(model).read_bytes()
            self._errors = [] if parses else [ParserError("no importer for Frobnicate"), ParserError("nor for Twiddle")]
            return parses

        @property
        def num_errors(self):
            return len(self._errors)

        def get_error(self, index):
            return self._errors[index]

    class IOptimizationProfile(metaclass=Documented):
        def set_shape(self, input, min, opt, max):
            assert input == "images" and all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True))
            self._shapes = [list(min), list(opt), list(max)]

    class ITimingCache(metaclass=Documented):
        def __init__(self, data):
            self._data = data or f"{version} {gpu}".encode()

        def serialize(self):
            return IHostMemory(self._data)

    class IBuilderConfig(metaclass=Documented):
        _cache = _shapes = None

        def set_memory_pool_limit(self, pool, pool_size):
            calls.append(("set_memory_pool_limit", pool, pool_size))

        def add_optimization_profile(self, profile):
            self._shapes = profile._shapes
            calls.append(("add_optimization_profile", profile._shapes))
            return 0

        def create_timing_cache(self, serialized_timing_cache):
            return None if serialized_timing_cache == b"damaged" else ITimingCache(serialized_timing_cache)

        def set_timing_cache(self, cache, ignore_mismatch):
            if not ignore_mismatch and not cache._data.startswith(f"{version} {gpu}".encode()):
                return False
            self._cache = cache
            return True

    class Builder(metaclass=Documented):
        def __init__(self, logger):
            if not gpu:
                raise TypeError("factory function returned nullptr")  # what the bindings say

        def create_network(self, flags=0):
            calls.append(("create_network", flags))
            return INetworkDefinition()

        def create_builder_config(self):
            return IBuilderConfig()

        def create_optimization_profile(self):
            return IOptimizationProfile()

        def build_serialized_network(self, network, config):
            dynamic = onnx.load_from_string(network._model).graph.input[0].type.tensor_type.shape.dim[0].dim_param
            if not builds or (dynamic and not config._shapes):
                return None
            calls.append(("build_serialized_network", config._cache._data))
            config._cache._data += b" timed"
            header = json.dumps([version, gpu, config._shapes]).encode()
            return IHostMemory(header + b"\n" + network._model)

    class IExecutionContext(metaclass=Documented):
        def __init__(self, engine):
            self._engine, self._shape, self._addresses = engine, None, {}

        def set_input_shape(self, name, shape):
            assert name == "images" and type(shape) is tuple
            self._shape = shape
            low, _, high = self._engine._shapes or [self._engine._fixed] * 3
            return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

        def set_tensor_address(self, name, memory):
            self._addresses[name] = memory
            return True

        def execute_async_v3(self, stream_handle):
            calls.append(("execute_async_v3", stream_handle))
            (source,), (target,) = self._engine._session.get_inputs(), self._engine._session.get_outputs()
            assert set(self._addresses) == {source.name, target.name}
            dtype = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}[source.type]
            images = self._at(self._addresses[source.name], self._shape, dtype)
            answers = self._engine._session.run(None, {source.name: images})[0]
            self._at(self._addresses[target.name], answers.shape, np.float32)[:] = answers
            return True

        @staticmethod
        def _at(address, shape, dtype):
            count = int(np.prod(shape)) * np.dtype(dtype).itemsize
            return np.frombuffer((ctypes.c_byte * count).from_address(address), dtype).reshape(shape)

    class ICudaEngine(metaclass=Documented):
        def __init__(self, shapes, model):
            self._shapes, self._session = shapes, onnxruntime.InferenceSession(model)
            self._fixed = self._session.get_inputs()[0].shape

        def create_execution_context(self):
            return IExecutionContext(self)

        def get_tensor_profile_shape(self, name, profile_index):
            assert (name, profile_index) == ("images", 0)
            return [tuple(shape) for shape in self._shapes]

    class Runtime(metaclass=Documented):
        def __init__(self, logger):
            assert isinstance(logger, Logger)

        def deserialize_cuda_engine(self, serialized_engine):
            header, model = serialized_engine.split(b"\n", 1)
            built_by, built_for, shapes = json.loads(header)
            return ICudaEngine(shapes, model) if (built_by, built_for) == (version, gpu) else None

    module = types.ModuleType("tensorrt")
    module.__version__ = version
    for stand_in in (Logger, NetworkDefinitionCreationFlag, MemoryPoolType, BuilderFlag, OnnxParser, Builder, Runtime):
        setattr(module, stand_in.__name__, stand_in)
    return module, calls


@pytest.fixture
def install(monkeypatch):
    """A function that makes `import tensorrt` give a stand-in, and CUDA streams ones; returns the calls."""
    stream = types.SimpleNamespace(cuda_stream=STREAM)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    def install(**options):
        module, calls = fake_tensorrt(**options)
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        return calls

    return install


def write_classifier(path, batch_size=None, preprocessing=False):
    """A file as export.py writes it: images of 4x6 to three answers, with their mean colour between."""
    layers = [("GlobalAveragePool", ["x"], ["mean"]), ("Flatten", ["mean"], ["flat"])]
    shape, kind, output = [batch_size or "batch", 3, 4, 6], TensorProto.FLOAT, "logits"
    if preprocessing:
        shape, kind, output = [shape[0], 4, 6, 3], TensorProto.UINT8, "probabilities"
        first = helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT)
        second = helper.make_node("Transpose", ["float"], ["x"], perm=[0, 3, 1, 2])
    nodes = [helper.make_node(*layer) for layer in layers] + [helper.make_node("Gemm", ["flat", "w"], ["scores"])]
    nodes = [first, second, *nodes] if preprocessing else [helper.make_node("Identity", ["images"], ["x"]), *nodes]
    nodes.append(helper.make_node("Softmax" if preprocessing else "Identity", ["scores"], [output]))
    weight = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32) / (255 if preprocessing else 1)
    graph = helper.make_graph(
        nodes, "classifier", [helper.make_tensor_value_info("images", kind, shape)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [shape[0], 3])],
        [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    facts = {
        "classes": ["a", "b", "c"],
        "preprocessing": {"input_size": [3, 4, 6], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
        "includes_preprocessing": preprocessing,
        "batch_size": batch_size,
    }
    helper.set_model_props(model, {name: json.dumps(value) for name, value in facts.items()})
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("version", ["11.4.0", "10.3.0"])
@pytest.mark.parametrize("preprocessing", [False, True])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_an_engine_answers_as_its_onnx_file(install, tmp_path, batch_size, preprocessing, version):
    """Whatever the number of images; of a fixed batch size too, which has no profile; on a stream of its own."""
    calls = install(version=version)
    source = write_classifier(tmp_path / "student.onnx", batch_size, preprocessing)
    tensorrt.build_engine(source, tmp_path / "student.engine", 2, 4, 64)
    made = dict(call[:2] for call in calls)
    assert made["create_network"] == (0 if version.startswith("11") else 2)  # bit 1, STRONGLY_TYPED
    assert ("set_memory_pool_limit", 0, 64 * 2**20) in calls
    rest = [4, 6, 3] if preprocessing else [3, 4, 6]
    assert made.get("add_optimization_profile") == (None if batch_size else [[1, *rest], [2, *rest], [4, *rest]])
    images = torch.rand(7, 3, 4, 6)
    classifier = tensorrt.TensorRT(tmp_path / "student.engine", Cuda("cpu"))
    assert classifier.classes == ["a", "b", "c"] and classifier.max_batch_size == (batch_size or 4)
    expected = OnnxRuntime(source, torch.device("cpu"))(images)
    torch.testing.assert_close(classifier(images), expected)
    assert calls.count(("execute_async_v3", STREAM)) == (3 if batch_size else 2)


def test_more_images_than_the_engine_takes_are_refused(install, tmp_path):
    install()
    tensorrt.build_engine(write_classifier(tmp_path / "a.onnx"), tmp_path / "a.engine", 1, 2, 64)
    classifier = tensorrt.TensorRT(tmp_path / "a.engine", Cuda("cpu"))
    with pytest.raises(RuntimeError, match="could not run"):
        classifier.run(torch.zeros(3, 3, 4, 6))


def test_the_timing_cache_is_read_and_written(install, tmp_path):
    """Beside the engine, or where the user says; a damaged one, or another GPU's, is begun anew."""
    source, engine = write_classifier(tmp_path / "student.onnx"), tmp_path / "student.engine"
    cache = tmp_path / "timing.cache"

    def build(*options, **machine):
        calls = install(**machine)
        tensorrt.build_engine(source, engine, 1, 1, 64, *options)
        return dict(call[:2] for call in calls)["build_serialized_network"]

    assert build() == b"11.4.0 a" and cache.read_bytes() == b"11.4.0 a timed"
    assert build() == b"11.4.0 a timed" and cache.read_bytes() == b"11.4.0 a timed timed"
    assert build(gpu="b") == b"11.4.0 b" and cache.read_bytes() == b"11.4.0 b timed"
    cache.write_bytes(b"damaged")
    assert build() == b"11.4.0 a"
    assert build(tmp_path / "other") == b"11.4.0 a" and (tmp_path / "other").read_bytes() == b"11.4.0 a timed"


@pytest.mark.parametrize(
    "machine, message",
    [
        ({"parses": False}, "cannot parse .*student.onnx: no importer for Frobnicate; nor for Twiddle"),
        ({"builds": False}, "11.4.0 cannot build .*student.onnx"),
        (
            {"gpu": None},
            "no usable GPU or driver .*factory function returned nullptr.*trtexec --onnx=.*student.onnx",
        ),
    ],
)
def test_what_fails_says_why_and_leaves_no_engine(install, tmp_path, machine, message):
    install(**machine)
    source = write_classifier(tmp_path / "student.onnx")
    with pytest.raises(UserError, match=message):
        tensorrt.build_engine(source, tmp_path / "student.engine", 1, 1, 64)
    assert [path.name for path in tmp_path.iterdir()] == ["student.onnx"]


def test_without_tensorrt_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    source = write_classifier(tmp_path / "student.onnx")
    with pytest.raises(UserError, match=r"pip install tensorrt \(CUDA 13\).*nvidia-jetpack.*trtexec --onnx=.*--minS"):
        tensorrt.build_engine(source, tmp_path / "student.engine", 1, 1, 64)


def test_engines_that_cannot_be_run_here(install, tmp_path):
    install()
    engine = tmp_path / "student.engine"
    tensorrt.build_engine(write_classifier(tmp_path / "student.onnx"), engine, 1, 1, 64)
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        tensorrt.TensorRT(engine, torch.device("cpu"))
    for machine in ({"version": "11.5.0"}, {"gpu": "b"}):
        install(**machine)
        with pytest.raises(UserError, match="another TensorRT or for another GPU"):
            tensorrt.TensorRT(engine, Cuda("cpu"))
    (tmp_path / "student.engine.json").unlink()
    with pytest.raises(UserError, match="json is missing"):
        tensorrt.TensorRT(engine, Cuda("cpu"))


def test_trtexec_builds_and_times_the_same_engine(tmp_path):
    source = write_classifier(tmp_path / "a.onnx", preprocessing=True)
    command = tensorrt.trtexec_command(source, "a.engine", 2, 4, 64, "timing.cache")
    assert command == [
        "trtexec", f"--onnx={source}", "--saveEngine=a.engine", "--stronglyTyped", "--minShapes=images:1x4x6x3",
        "--optShapes=images:2x4x6x3", "--maxShapes=images:4x4x6x3", "--memPoolSize=workspace:64",
        "--timingCacheFile=timing.cache", "--skipInference",
    ]  # fmt: skip
    timing = tensorrt.trtexec_timing_command(source, "a.engine", 2)
    assert {"--loadEngine=a.engine", "--shapes=images:2x4x6x3", "--duration=10"} < set(timing)
    fixed = write_classifier(tmp_path / "b.onnx", batch_size=3)
    commands = [
        tensorrt.trtexec_command(fixed, "b.engine", 3, 3, 64, "timing.cache"),
        tensorrt.trtexec_timing_command(fixed, "b.engine", 3),
    ]
    assert not any("hapes" in argument for command in commands for argument in command)
    for arguments in [command, timing, *commands]:
        assert {argument[2:].split("=")[0] for argument in arguments[1:]} <= TRTEXEC_OPTIONS


def test_the_stand_in_has_no_names_that_the_documentation_lacks():
    module, _ = fake_tensorrt()
    for name in ("FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"):
        with pytest.raises(AttributeError):
            getattr(module.BuilderFlag, name)
    config = module.Builder(module.Logger(module.Logger.WARNING)).create_builder_config()
    with pytest.raises(AttributeError):
        _ = config.int8_calibrator
    with pytest.raises(AssertionError, match="set_calibration_profile"):
        Documented("IBuilderConfig", (), {"set_calibration_profile": None})
