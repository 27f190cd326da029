"""A student as a page for browsers: a folder that any web server gives out, and that asks for nothing elsewhere."""

import shlex
from pathlib import Path

from common.cli import UserError
from common.records import write_file
from common.report import TEMPLATES

PACKAGE = "node_modules/onnxruntime-web"  # where npm puts it
VERSION = "1.30.0"  # of the package, from a CDN where it is not installed
FILES = {  # of it, with what a browser checks those from the CDN by
    "ort.wasm.bundle.min.mjs": "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
    "ort-wasm-simd-threaded.wasm": "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
}
CDN = "https://cdn.jsdelivr.net"


def find_package(folder):
    """The folder of the files of the npm package onnxruntime-web, or None where the usual PACKAGE is not there. A
    UserError tells of another folder that is not that package."""
    built = Path(folder) / "dist"
    missing = [name for name in FILES if not (built / name).is_file()]
    if missing and folder != PACKAGE:
        raise UserError(f"--web {folder}: dist/{missing[0]} is missing: give the npm package onnxruntime-web.")
    return None if missing else built


def write_page(folder, graph, classes, package=PACKAGE):
    """Writes index.html, student.onnx and, unless a CDN has to give it out, onnxruntime-web into `folder`.

    Args:
        graph: the bytes of an ONNX model, uint8 images [1, h, w, 3] of any size to probabilities.
        package: the folder of the npm package.
    """
    folder, built = Path(folder), find_package(package)
    source = "./" if built else f"{CDN}/npm/onnxruntime-web@{VERSION}/dist/"
    files = [{"url": source + name, "integrity": "" if built else checked} for name, checked in FILES.items()]
    page = TEMPLATES.get_template("web.html").render(classes=classes, files=files, origin="" if built else CDN)
    contents = {"student.onnx": graph, "index.html": page.encode()}
    contents |= {name: (built / name).read_bytes() for name in FILES if built}
    for name, content in contents.items():
        write_file(folder / name, content)


def serving(folder):
    """In words, how to see the page."""
    return f"{shlex.join(['python', '-m', 'http.server', '--directory', str(folder)])}, then http://localhost:8000"
