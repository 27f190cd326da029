"""The page for browsers, in Chromium: it answers as Python does, by its own inputs, and asks for nothing elsewhere."""

import contextlib
import functools
import http.server
import re
import shutil
import threading

import pytest
import torch
from PIL import Image

import export
from common import models
from common.cli import UserError
from common.images import load_image, open_image
from common.runtimes import web
from tests import ROOT
from tests.pictures import save_pictures

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PACKAGE = ROOT / web.PACKAGE
KINDS = ("rgb_*", "rgba.png", "grey.*", "grey_alpha.png", "palette*", "turned_[1-8].jpg", "interlaced.png",
         "progressive*", "colours_*", "1x1*", "2x3*")  # fmt: skip
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
with_package = pytest.mark.skipif(not PACKAGE.is_dir(), reason="npm install onnxruntime-web has not been run")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextlib.contextmanager
def served(folder):
    """The address of a folder that Python's own web server gives out."""
    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def camera(run_dir, tmp_path_factory):
    """The photo that the camera sees."""
    photo = Image.open(sorted((run_dir / "query").rglob("*.png"))[0]).convert("RGB").resize((320, 240))
    path = tmp_path_factory.mktemp("camera") / "video.mjpeg"
    photo.save(path, "jpeg", quality=95)
    return path


@pytest.fixture(scope="module")
def chromium(camera):
    from playwright.sync_api import sync_playwright

    seen = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", *seen, f"--use-file-for-fake-video-capture={camera}"]
        )
        yield browser
        browser.close()


@contextlib.contextmanager
def visit(chromium, address, route=None, script=None):
    """The page at 390 pixels, when it has said that it is ready or why not; with `.errors` and `.asked`, addresses."""
    page = chromium.new_page(viewport={"width": 390, "height": 844})
    page.errors, page.asked = [], []
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    if route:
        page.route(f"{web.CDN}/**", route)
    if script:
        page.add_init_script(script)
    page.goto(address)
    page.get_by_role("status").filter(has_text=re.compile("Ready|cannot run here")).wait_for(timeout=120000)
    yield page
    page.close()


def found(page, section):
    """[(title, [(class, probability)] of the likeliest)] of the pictures of a section, as the page shows them."""
    articles = page.locator(f"#{section} article").evaluate_all("""articles => articles.map(article => [
        article.querySelector("h2").textContent,
        [...article.querySelectorAll("li")].map(row => [row.querySelector("span"), row.querySelector("data")]
            .flatMap(part => [part.textContent, part.value])),
    ])""")
    for _, rows in articles:
        assert [shown for _, _, shown, _ in rows] == [f"{100 * float(value):.1f} %" for *_, value in rows]
    return [(title, [(name, float(value)) for name, _, _, value in rows]) for title, rows in articles]


@torch.inference_mode()
def expected(run_dir, path):
    """The same by PyTorch."""
    model = models.with_head(models.load_model(str(run_dir / "student")))
    probabilities = model(load_image(path, 32)[None]).softmax(-1)[0]
    classes = models.class_names(run_dir / "student")
    return [(classes[i], probabilities[i].item()) for i in probabilities.argsort(descending=True)[:3]]


def rounds_otherwise(path):
    """Whether pixels may be a grey level off: Chromium lays a transparent WebP on white with another rounding, and of
    images so high that Pillow begins with the rows the graph resizes the columns first, like all others."""
    width, height = open_image(path).size
    return path.suffix == ".webp" or height - 32 > 2 * (width - 32)


@in_chromium
@with_package
def test_the_page_answers_as_python_does_and_asks_for_nothing_elsewhere(run_dir, chromium, camera, tmp_path):
    save_pictures(tmp_path)
    pictures = sorted({path for kind in KINDS for path in tmp_path.glob(kind)})
    Image.open(tmp_path / "rgba.png").save(tmp_path / "transparent.webp", lossless=True)
    paths = [*sorted((run_dir / "query").rglob("*.png")), *pictures, tmp_path / "transparent.webp"]
    (tmp_path / "broken.jpg").write_text("no picture")
    with served(run_dir / "export" / "web") as address, visit(chromium, address) as page:
        page.get_by_label("Choose photos").set_input_files([*paths, tmp_path / "broken.jpg"])
        page.get_by_text(f"{len(paths) + 1} photos are done.").wait_for(timeout=120000)
        answers = found(page, "results")
        assert [name for name, _ in answers] == [path.name for path in paths] and len(paths) > 50
        for path, (_, answer) in zip(paths, answers):
            (first, _), *_ = truth = expected(run_dir, path)
            bound = 5e-3 if rounds_otherwise(path) else 1e-3
            assert answer[0][0] == first and dict(answer) == pytest.approx(dict(truth), abs=bound), path.name
        assert page.get_by_text("broken.jpg cannot be read").count() == 1

        bytes_of = list(paths[0].read_bytes())
        page.evaluate("""bytes => {
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([new Uint8Array(bytes)], "dropped.png"));
            document.body.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true }));
        }""", bytes_of)  # fmt: skip
        (name, value), *_ = expected(run_dir, paths[0])
        page.get_by_role("status").filter(has_text=f"dropped.png: {name}, {100 * value:.1f} %").wait_for()

        page.get_by_role("button", name="Use the camera").click()
        (name, _), *_ = expected(run_dir, camera)
        page.get_by_role("status").filter(has_text=f"Camera: {name}").wait_for()
        assert found(page, "live")[0][1][0][0] == name
        page.get_by_role("button", name="Stop the camera").click()
        assert not found(page, "live")

        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert not page.errors and all(asked.startswith((address, "blob:", "data:")) for asked in page.asked)


@in_chromium
@with_package
def test_without_the_package_the_page_takes_it_from_a_cdn_and_nothing_else(run_dir, chromium, tmp_path):
    """What the CDN gives out must be what its hash says."""
    graph = (run_dir / "export" / "web" / "student.onnx").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        web.write_page("page", graph, ["a", "b"])
    assert {path.name for path in (tmp_path / "page").iterdir()} == {"index.html", "student.onnx"}
    given = []

    def give(route, spoilt=""):
        name = route.request.url.rpartition("/")[2]
        given.append(name)
        kind = "text/javascript" if name.endswith("mjs") else "application/wasm"
        content = {"body": b"// another"} if name == spoilt else {"path": PACKAGE / "dist" / name}
        route.fulfill(**content, headers={"Access-Control-Allow-Origin": "*", "Content-Type": kind})

    with served(tmp_path / "page") as address:
        with visit(chromium, address, give) as page:
            assert "Ready" in page.get_by_role("status").inner_text() and not page.errors
        assert set(given) == set(web.FILES)
        for name in web.FILES:
            with visit(chromium, address, functools.partial(give, spoilt=name)) as page:
                assert "cannot run here" in page.get_by_role("status").inner_text()


@in_chromium
@with_package
def test_the_page_says_what_it_needs(run_dir, chromium):
    folder = run_dir / "export" / "web"
    with served(folder) as address, visit(chromium, address, script="delete globalThis.WebAssembly") as page:
        assert "it needs WebAssembly" in page.get_by_role("status").inner_text()
        assert page.get_by_label("Choose photos").is_disabled()
    page = chromium.new_page(java_script_enabled=False)
    page.goto((folder / "index.html").as_uri())
    assert "python -m http.server" in page.get_by_role("status").inner_text()
    page.close()


def test_a_folder_that_is_not_the_package_is_refused(run_dir, tmp_path):
    args = export.parse_args(["--model", str(run_dir / "student"), "--web", str(tmp_path)])
    with pytest.raises(UserError, match=r"dist/ort.*is missing: give the npm package"):
        export.main(args)
