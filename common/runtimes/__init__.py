"""What runs a student: a class of `Runtime` each, in a file of its own.

To add a runtime, write its class and name it in RUNTIMES: export.py then offers it, lets it make its file, compares its
answers and times it, and evaluate.py opens its files.
"""

from pathlib import Path

from common.cli import UserError
from common.runtimes.aotinductor import AotInductor
from common.runtimes.executorch import ExecuTorch
from common.runtimes.onnxruntime import OnnxRuntime
from common.runtimes.openvino import OpenVino
from common.runtimes.pytorch import Compiled, PyTorch
from common.runtimes.tensorrt import TensorRT

RUNTIMES = {
    "torch": PyTorch, "torch_compile": Compiled, "onnxruntime": OnnxRuntime, "openvino": OpenVino,
    "aotinductor": AotInductor, "tensorrt": TensorRT, "executorch": ExecuTorch,
}  # fmt: skip
OPENED_BY = {runtime.suffix: runtime for runtime in RUNTIMES.values() if runtime.suffix}  # files that export.py writes


def open_exported(path, device):
    """An exported file, in that of OPENED_BY by its name's end. A UserError tells of none, or is the runtime's own."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file. export.py writes it.")
    return OPENED_BY[Path(path).suffix](path, device)
