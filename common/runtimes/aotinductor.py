"""A student as an AOTInductor package: compiled ahead of time into one file, which libtorch runs without Python.

The file's metadata say all that a program needs beside it, without the need to parse JSON: "classes" (one a line),
"input_size" ("height width") and "batch_sizes" ("smallest largest"). `cpp/classify.cpp` reads them.
"""

import copy
import logging

import torch

from common.cli import UserError, refusing
from common.models import input_size
from common.preprocessing import WithPreprocessing
from common.records import whole_file
from common.runtimes.base import Runtime


def build_package(module, classes, batch_size, device, path, max_batch_size=256):
    """Writes `path`, whole or not at all. It runs with any number of threads, on CPUs that have this one's vector
    instructions or, where `device` is a GPU, on GPUs of its compute capability. A UserError tells of no C++ compiler,
    or one that cannot compile the model.

    Args:
        module: in eval mode, of images uint8 [B, H, W, 3] to probabilities [B, num_classes]; `.model` is a timm model.
        classes: the class names in the order of the outputs.
        batch_size: a fixed B, or None: any from 1 to max_batch_size.
        device: the torch device to compile for.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes a second to import
    from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler

    install = "install one (Debian: apt-get install g++), or name it in the environment variable CXX."
    with refusing(f"{path} needs a C++ compiler, and none is found: {install}", InvalidCxxCompiler):
        get_cpp_compiler()
    size, batch_size = input_size(module.model), batch_size or (1 if max_batch_size == 1 else None)
    smallest, largest = (batch_size, batch_size) if batch_size else (1, max_batch_size)
    # Of one example image the compiler would conclude that there is always one.
    example = torch.zeros(batch_size or 2, *size, 3, dtype=torch.uint8, device=device)
    dynamic = None if batch_size else ({0: torch.export.Dim("batch", min=smallest, max=largest)},)
    settings = {
        "aot_inductor.metadata": {
            "classes": "\n".join(classes),
            "input_size": f"{size[0]} {size[1]}",
            "batch_sizes": f"{smallest} {largest}",
        },
        "aot_inductor.precompile_headers": False,  # takes longer than one model gains by it
        "cpp.dynamic_threads": True,  # or today's number of threads would be built in
        "freezing": True,  # folds batch normalisation into the convolutions, and packs their weights
    }
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # misses CUDA where nobody asked for it
    try:
        # A file and not its name, which would have to end in .pt2.
        with torch.no_grad(), whole_file(path) as temporary, temporary.open("wb") as file:
            program = torch.export.export(copy.deepcopy(module).to(device), (example,), dynamic_shapes=dynamic)
            torch._inductor.aoti_compile_and_package(program, package_path=file, inductor_configs=settings)
    except InductorError as error:
        if not isinstance(error.inner_exception, CppCompileError):
            raise
        raise UserError(f"{path} cannot be compiled: {error.inner_exception}") from error


class AotInductor(Runtime):
    """A package, on the kind of device that it was compiled for; a UserError tells of another, or of no package."""

    suffix, includes_preprocessing = ".pt2", True

    @classmethod
    def build(cls, student):
        module, options = WithPreprocessing(student.model).eval(), student.options
        path = student.folder / "student.pt2"
        build_package(module, student.classes, options.batch_size, student.device, path, options.max_batch_size)

    @classmethod
    def sources(cls, student, device):
        return {"fp32": student.folder / "student.pt2"} if device == student.device else {}

    def __init__(self, path, device, num_threads=None):
        with refusing(f"{path} is no package for this machine and torch ({{error}}): export it here."):
            package = torch._inductor.aoti_load_package(str(path), device_index=device.index or -1)
            metadata = package.get_metadata()
            self.classes = metadata["classes"].split("\n")
            self.pretrained_cfg = {"input_size": (3, *map(int, metadata["input_size"].split()))}
            smallest, self.max_batch_size = map(int, metadata["batch_sizes"].split())
            compiled_for = metadata["AOTI_DEVICE_KEY"]
        if compiled_for != device.type:
            raise UserError(f"{path} was compiled for {compiled_for}, not {device.type}: export it again.")
        self.fixed = smallest == self.max_batch_size
        self.loader, self.device = package.loader, device  # a call of the package itself parses JSON each time

    def run(self, inputs):
        return self.loader.run([inputs.to(self.device)])[0].cpu()
