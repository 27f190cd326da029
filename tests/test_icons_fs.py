"""The bundled data: complete, split without overlap, and episodes that everybody draws alike."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2 import functional as TF
from transformers import CLIPTokenizer

from assets.train_diffusion import forget, train_tokenizer
from assets.training import IconWeb
from common import icons_fs, models
from common.architectures import InkMap
from tests.conftest import ROOT, launch

PERMISSIVE = {
    "MIT",
    "Apache-2.0",
    "CC-BY-3.0",
    "CC-BY-4.0",
    "ISC",
    "CC0-1.0",
    "OFL-1.1",
    "Unlicense",
    "BSD-3-Clause",
    "WTFPL",
}


def test_every_drawing_has_its_picture_and_its_licence():
    drawings, splits = icons_fs.load_drawings(), icons_fs.load_splits()
    sizes = {split: len(names) for split, names in splits.items()}
    assert sizes == {"base": 64, "val": 16, "novel": 20, "unseen_val": 13, "unseen": 30}
    names = [name for split in splits.values() for name in split]
    assert sorted(drawings) == sorted(names) and len(names) == len(set(names))
    for name, facts in drawings.items():
        assert (45 if name in splits["unseen_val"] + splits["unseen"] else 90) <= len(facts) <= 200
        rows = -(-len(facts) // icons_fs.COLUMNS)
        for folder in ("sheets", "ink"):
            assert Image.open(icons_fs.FOLDER / folder / f"{name}.png").size == (10 * 32, rows * 32)
        last = icons_fs.load_class(name, len(facts))[-1]
        assert last.shape == (3, 32, 32) and last.std() > 0.01
    licenses = {fact["license"] for facts in drawings.values() for fact in facts}
    assert licenses <= PERMISSIVE
    attribution = (icons_fs.FOLDER / "ATTRIBUTION.md").read_text()
    assert all(f"| {fact['set']} |" in attribution for facts in drawings.values() for fact in facts)


def shapes(images):
    """What is drawn, as unit vectors [N, 34, 34]: ink cut out, scaled to 30 pixels, slightly blurred, less its mean."""
    shapes = []
    for ink in InkMap()(images * 2 - 1):
        (top, left), (bottom, right) = (edge(ink[0] > 0.5) for edge in (first_ink, last_ink))
        height, width = bottom - top, right - left
        scale = 30 / max(height, width)
        size = [max(1, round(height * scale)), max(1, round(width * scale))]
        cut = TF.resize(ink[:, top:bottom, left:right], size, antialias=True)
        y, x = 34 - size[0], 34 - size[1]
        shapes.append(F.pad(cut, (x // 2, x - x // 2, y // 2, y - y // 2)))
    shapes = TF.gaussian_blur(torch.cat(shapes), 5, 0.6)
    shapes = shapes - shapes.mean((1, 2), keepdim=True)
    return shapes / shapes.norm(dim=(1, 2), keepdim=True)


def first_ink(ink):
    return ink.nonzero().amin(0).tolist()


def last_ink(ink):
    return (ink.nonzero().amax(0) + 1).tolist()


def likeness(a, b):
    """Correlation [N, M] of shapes, or of a shape with a negative, the best of shifts by up to a pixel."""
    shifted = [b.roll((dy, dx), (1, 2)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return torch.stack([(a.flatten(1) @ s.flatten(1).T).abs() for s in shifted]).amax(0)


def test_web_pool_and_episodes_never_meet():
    """No icon family draws for both pools, and no drawing of one is found in the other, whatever its colours and place.

    The closest pair of different designers' drawings is alike to 0.966. A drawing of which a copy in other colours lay
    in the other pool would be found, and every third one if the copy were also of another size.
    """
    drawings, splits = icons_fs.load_drawings(), icons_fs.load_splits()
    families = {"web": set(), "episode": set()}
    for name in splits["val"] + splits["novel"]:
        pools = np.array([fact["pool"] for fact in drawings[name]])
        assert set(pools) == {"web", "episode"} and np.mean(pools == "web") == pytest.approx(0.4, abs=0.15)
        for fact in drawings[name]:
            families[fact["pool"]].add(fact["family"])
        found = shapes(icons_fs.load_class(name, len(pools)))
        closest = likeness(found[pools == "web"], found[pools == "episode"]).amax().item()
        assert closest < 0.97, f"{name}: a drawing of the web pool is one of episodes"
    assert not families["web"] & families["episode"]
    assert all(fact["pool"] == "base" for name in splits["base"] for fact in drawings[name])

    one_colour = [fact["style"] != "colour" for fact in drawings["umbrella"]]
    original = shapes(icons_fs.load_class("umbrella", len(one_colour))[one_colour])
    ink = icons_fs.load_class("umbrella", len(one_colour), "ink")[one_colour]
    smaller = F.pad(TF.resize(ink, [27, 27], antialias=True), (1, 4, 3, 2))
    red = torch.tensor([0.8, 0.1, 0.1])[:, None, None]
    for copy, expected in ((ink.roll((1, -1), (2, 3)), 0.9), (smaller, 0.3)):
        again = likeness(original, shapes(1 + copy * (red - 1))).diagonal()
        assert (again > 0.97).float().mean() > expected


def test_no_model_has_seen_an_unseen_class():
    """Mini-SD knows no word for it, teacher and student no class, and no drawing is one that a model was trained on."""
    drawings, splits = icons_fs.load_drawings(), icons_fs.load_splits()
    words = json.loads((ROOT / "assets" / "icons_fs_classes.json").read_text())["classes"]
    unseen = splits["unseen_val"] + splits["unseen"]
    seen = splits["base"] + splits["val"] + splits["novel"]
    assert not {n for c in unseen for n in words[c]["names"]} & {n for c in seen for n in (c, *words[c]["names"])}
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "assets" / "mini-sd" / "tokenizer")

    def is_known(word):
        return len(tokenizer(word, add_special_tokens=False).input_ids) == 1

    assert is_known("umbrella")
    known = [word for name in unseen for word in name.split("-") if is_known(word)]
    known += [name for c in unseen for name in words[c]["names"] if all(map(is_known, name.split("-")))]
    assert not known, f"mini-SD knows {known}"
    for model in ("teacher", "student"):
        assert models.class_names(ROOT / "assets" / model) == splits["base"]

    def load(names, pools):
        """The icons of some pools, and what those of one colour show: of several colours, ink is guessed, and blobs
        of different things are alike."""
        chosen = {name: [i for i, fact in enumerate(drawings[name]) if fact["pool"] in pools] for name in names}
        icons = {(drawings[name][i]["set"], drawings[name][i]["icon"]) for name, rows in chosen.items() for i in rows}
        rows = {name: [i for i in rows if drawings[name][i]["style"] != "colour"] for name, rows in chosen.items()}
        return icons, torch.cat([shapes(icons_fs.load_class(name)[own]) for name, own in rows.items()])

    icons, new = load(unseen, {"episode"})
    trained_icons, trained = load(seen, {"base", "web"})
    assert not icons & trained_icons
    closest = torch.cat([likeness(new, part).amax(1, keepdim=True) for part in trained.split(2000)], 1).amax()
    assert closest < 0.97


def test_assets_hold_no_pickles():
    suffixes = {p.suffix for p in (ROOT / "assets").rglob("*") if p.is_file()}
    assert not suffixes & {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".npy", ".npz"}
    for config in (ROOT / "assets").glob("*/config.json"):
        assert json.loads(config.read_text())["architecture"]


def test_the_icon_web_leaves_held_out_things_out(tmp_path):
    """Names with a held-out word, drawings like a held-out one, and names that are mostly drawn so."""
    pytest.importorskip("resvg_py")
    square, ring = "M2 2h12v12h-12z", "M8 1a7 7 0 1 0 .01 0zM8 4a4 4 0 1 1-.01 0z"

    def bodies(path):  # turned, so that they differ
        turned = (f'<g transform="rotate({7 * k} 8 8)"><path d="{path}M8 8L15 8V9z"/></g>' for k in range(10))
        return [body.replace("<path", '<path fill="currentColor"') for body in turned]

    icons = {f"anchor-{k}": {"body": body} for k, body in enumerate(bodies(ring))}
    icons |= {f"anchors-rope-{k}": {"body": body} for k, body in enumerate(bodies(square))}  # a held-out word
    icons |= {f"rocket-{k}": {"body": body} for k, body in enumerate(bodies(square))}  # a base class
    icons |= {f"washer-{k}": {"body": body} for k, body in enumerate(bodies(ring))}  # drawn as the anchors are
    icons |= {f"tile-{k}": {"body": body} for k, body in enumerate(bodies(square))}
    icons |= {"tile-20": icons["anchor-3"], "lone": icons["tile-1"]}
    (tmp_path / "json").mkdir()
    facts = {"info": {"license": {"spdx": "MIT"}}, "icons": icons}
    (tmp_path / "json" / "set.json").write_text(json.dumps(facts))
    launch("-m", "assets.build_icon_web", "--iconify_dir", tmp_path, "--output_file", tmp_path / "web.safetensors")
    web = IconWeb(tmp_path / "web.safetensors", ["base"], ["base"])
    count = len(web) - 10
    assert web.classes == [*icons_fs.load_splits()["base"], "tile"] and web.labels[count:].tolist() == [64] * 10
    assert web.images.shape == (count + 10, 3, 32, 32) and 0.3 < web.inks[count:].mean() < 0.9
    assert web.paint([count], np.random.default_rng(0))[0].std() > 0.1


def test_a_diffusion_training_that_goes_on_keeps_its_tokenizer(tmp_path):
    """Each training of a tokenizer numbers its tokens otherwise, and weights are by number."""
    first, again = (train_tokenizer(["cat", "light-bulb"], tmp_path / "tokenizer") for _ in range(2))
    assert first.get_vocab() == again.get_vocab() and first.model_max_length == again.model_max_length
    assert [len(again.tokenize(word)) for word in ("cat", "light", "bulb")] == [1, 1, 1]


def test_a_forgotten_word_is_no_token_and_no_other_changes_its_number(tmp_path):
    before = train_tokenizer(["fish", "jellyfish", "cat"], tmp_path / "tokenizer")
    forget(tmp_path / "tokenizer", {"fish"})
    after = train_tokenizer(["fish", "jellyfish", "cat"], tmp_path / "tokenizer")  # by a training started again
    assert len(before.tokenize("fish")) == 1 < len(after.tokenize("fish"))
    assert "".join(after.tokenize("jellyfish")) == "jellyfish</w>"
    assert after.get_vocab() == before.get_vocab() and after.tokenize("cat") == before.tokenize("cat") == ["cat</w>"]
