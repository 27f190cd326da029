"""Build Icons-FS, the small real data set of this repository, from permissively licensed icon sets.

Icons-FS holds 32x32 drawings of everyday objects: 64 base, 16 validation and 20 novel classes as in CIFAR-FS,
and classes that no model has seen, "unseen" and, to choose on, "unseen_val". A class's drawings come from many
designers and differ as photos of an object do: style, viewpoint, detail. Of each validation and novel class, the
drawings of some design families form the "web" pool, which stands for what a diffusion model has seen of a novel
object on the web; episodes draw supports and queries from the other families only. Of unseen classes no drawing is
in that pool, none is a near-duplicate of a drawing of a seen class, and no word means the same.

Which icon names count for a class, which drawings were dropped after looking at them, and which icon sets are
known to share a designer are facts, not code: see icons_fs_classes.json.

    npm pack @iconify/json@2.2.535 && tar xzf iconify-json-2.2.535.tgz
    python -m assets.build_icons_fs --iconify_dir package --output_dir assets/icons_fs
"""

import argparse
import hashlib
import io
import json
import re
import sys
from collections import Counter, defaultdict
from multiprocessing import Pool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a file, too

import numpy as np
import resvg_py
from PIL import Image
from scipy import ndimage

from assets.colours import BACKGROUND_PROBABILITIES, BACKGROUNDS, draw_colours

SIZE, COLUMNS = 32, 10  # pixels of a tile, tiles in a row of a sheet
RENDER_SIZE = 144  # pixels of the longer side of a rendered icon, before it is cropped to its ink and reduced

# Facts found by looking, not by computing: permissive licences, the words of icon names that name a style and
# not an object, the icon sets of one designer, and each class's names, split and dropped drawings.
FACTS = json.loads(Path(__file__).with_name("icons_fs_classes.json").read_text())
PERMISSIVE = set(FACTS["permissive_licenses"])
STYLE_WORDS = {style: set(words) for style, words in FACTS["style_words"].items()}
# Stroke weights do not tell filled from outline: Phosphor's "bold" is a thick outline, Solar's is filled.
WEIGHT_WORDS, VARIANT_WORDS = set(FACTS["weight_words"]), set(FACTS["variant_words"])
SKIPPED_CATEGORIES = {"Logos", "Programming"}  # trademarks and file types: no everyday objects

# Two drawings are near-duplicates when their similarity (see `similarity`) exceeds these. Set by looking at
# pairs sorted by similarity; see the notes in icons_fs_classes.json.
DUPLICATE = 0.94
DUPLICATE_ACROSS_POOLS = 0.92
SHARED_DRAWINGS = 0.3  # share of near-duplicates that makes two icon sets one family
MAX_DRAWINGS, MIN_DRAWINGS, MIN_EPISODE_DRAWINGS, MIN_UNSEEN_DRAWINGS = 200, 90, 55, 45
WEB_SHARE = 0.4
SEEN = ("base", "val", "novel")
UNSEEN = ("unseen_val", "unseen")


def rng_for(*key):
    """Random generator of one drawing, seeded by its name: it does not depend on what else is built."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def parse_name(name):
    """Split an icon's name into (object, drawing, style).

    "camera-outline-rounded-24" gives ("camera", "camera", "outline"), "camera-2-bold" ("camera", "camera-2",
    None). The object decides about the class. Icons of a set with the same drawing and style differ only in
    stroke weight, corner radius or grid size.
    """
    words = name.lower().replace("two-tone", "twotone").split("-")
    style, rest = None, []
    for word in words:
        found = next((s for s, vocabulary in STYLE_WORDS.items() if word in vocabulary), None)
        if found:
            style = "duotone" if "duotone" in (style, found) else style or found
        elif word not in WEIGHT_WORDS:
            rest.append(word)
    objects = (re.sub(r"\d+$", "", word) for word in rest if word not in VARIANT_WORDS)
    return "-".join(word for word in objects if word), "-".join(rest), style


def collect(icon_sets, classes, seed):
    """Find the candidates of all classes by name, as a list of dicts.

    Of icons which differ only in weight, corners or size (same set, drawing and style) a random one is taken.
    """
    class_of = {name: c for c, entry in classes.items() for name in entry["names"]}
    # What is wrong with a drawing is wrong in all its styles and weights, so they go together.
    dropped = set()
    for c, entry in classes.items():
        for prefix, icon in (name.split(":") for name in entry["drop"]):
            dropped.add((c, prefix, parse_name(icon)[1]))
    variants = defaultdict(list)
    for prefix, icon_set in icon_sets.items():
        info = icon_set["info"]
        if info["license"].get("spdx") not in PERMISSIVE or info.get("category") in SKIPPED_CATEGORIES:
            continue
        for icon, data in icon_set["icons"].items():
            name, drawing, style = parse_name(icon)
            c = class_of.get(f"{prefix}:{icon}") or class_of.get(name) or class_of.get(icon)
            if c is None or data.get("hidden") or (c, prefix, drawing) in dropped:
                continue
            if info.get("palette") and "currentColor" not in data["body"]:
                style = "colour"
            elif style is None:  # some sets carry the style in their own name, as fa-solid
                set_words = set(prefix.split("-"))
                style = next((s for s, vocabulary in STYLE_WORDS.items() if set_words & vocabulary), None)
            box = [data.get(key, icon_set.get(key, default)) for key, default in
                   (("left", 0), ("top", 0), ("width", 16), ("height", 16))]  # fmt: skip
            candidate = {"class": c, "set": prefix, "icon": icon, "style": style}
            variants[c, prefix, drawing, style].append(candidate | {"body": data["body"], "box": box})

    groups = (group for _, group in sorted(variants.items(), key=lambda item: tuple(map(str, item[0]))))
    return [min(group, key=lambda d: rng_for(seed, d["set"], d["icon"]).random()) for group in groups]


def render(candidate, colour):
    """Rasterise an icon in the given colour: RGBA float array in 0..255, longer side RENDER_SIZE."""
    left, top, width, height = candidate["box"]
    scale = RENDER_SIZE / max(width, height)
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width * scale:.2f}" height="{height * scale:.2f}">'
        f"{candidate['body'].replace('currentColor', colour)}</svg>"
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")).astype(np.float32)


def place(image, fill, shift, background):
    """Scale a cropped image (H x W x C in 0..255) to `fill` of a tile on the background colour (C values).

    `shift` in -1..1 moves it from the centre by up to 3% of the tile. Returns uint8 SIZE x SIZE x C.
    """
    canvas_size = 4 * SIZE  # supersampled: a shift by parts of a pixel keeps edges antialiased
    scale = fill * canvas_size / max(image.shape[:2])
    height, width = (max(1, round(n * scale)) for n in image.shape[:2])
    canvas = np.zeros((canvas_size, canvas_size, image.shape[2]), np.float32) + background
    limit = 0.03 * canvas_size
    y = round((canvas_size - height) / 2 + shift[0] * min(limit, (canvas_size - height) / 2))
    x = round((canvas_size - width) / 2 + shift[1] * min(limit, (canvas_size - width) / 2))
    pixels = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    resample = Image.BOX if scale < 1 else Image.BICUBIC
    for channel in range(image.shape[2]):
        resized = Image.fromarray(pixels[..., channel]).resize((width, height), resample)
        canvas[y : y + height, x : x + width, channel] = resized
    return np.rint(canvas.reshape(SIZE, 4, SIZE, 4, -1).mean(axis=(1, 3))).astype(np.uint8)


def draw(job):
    """Turn a candidate into a drawing, or None if it is blank, a full tile or does not render.

    Adds to the candidate: style, foreground and background words, image (SIZE x SIZE x 3 uint8), ink (SIZE x
    SIZE uint8, 0 background to 255 ink; zero for multi-colour drawings) and shape (SIZE x SIZE float, the ink
    centred and without random shift, for comparisons).
    """
    candidate, seed = job
    rng = rng_for(seed, candidate["class"], candidate["set"], candidate["icon"])
    try:
        rgba = render(candidate, "#000000")
    except ValueError:  # a few icons are not valid SVG for resvg
        return None
    alpha = rgba[..., 3:] / 255
    rows, columns = (np.flatnonzero((alpha[..., 0] > 0.08).any(axis=axis)) for axis in (1, 0))
    if not len(rows) or max(np.ptp(rows), np.ptp(columns)) < 40:
        return None
    crop = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    rgb, alpha = rgba[crop][..., :3], alpha[crop]
    saturation = (np.ptp(rgb, axis=-1) * alpha[..., 0]).sum() / alpha.sum()
    style = "colour" if saturation > 12 else candidate["style"]
    # Where an icon is drawn in black, what it paints white is background.
    ink = alpha * (255 - rgb.mean(axis=-1, keepdims=True))
    shape_ink = np.maximum(ink, 0.35 * 255 * alpha) if style == "colour" else ink  # yellow on white has a shape
    shape = place(shape_ink, 0.95, (0, 0), [0])[..., 0].astype(np.float32)
    if not 0.03 < shape.mean() / 255 < 0.93 or shape.std() / 255 < 0.06:
        return None

    fill, shift = rng.uniform(0.86, 0.95), rng.uniform(-1, 1, 2)
    tile_ink = place(ink, fill, shift, [0])
    if style == "colour":
        foreground, background = None, str(rng.choice(list(BACKGROUNDS), p=BACKGROUND_PROBABILITIES))
        ground = np.clip(BACKGROUNDS[background] + rng.normal(0, 5, 3), 0, 255)
        image = place(rgb * alpha + ground * (1 - alpha), fill, shift, ground)
        tile_ink = np.zeros_like(tile_ink)
    else:
        foreground, background, front, ground = draw_colours(rng)
        weight = tile_ink / 255.0
        image = np.rint(front * weight + ground * (1 - weight)).astype(np.uint8)
        if style is None:  # by thickness: is an eighth of the ink deeper than 9 of 144 pixels?
            inside = ndimage.binary_erosion(ink[..., 0] > 110, iterations=9).sum()
            style = "filled" if inside > 0.12 * (ink > 110).sum() else "outline"
    if image.astype(np.float32).std(axis=(0, 1)).max() < 8:
        return None
    keep = {key: candidate[key] for key in ("class", "set", "icon")}
    return keep | {"style": style, "foreground": foreground, "background": background,
                   "image": image, "ink": tile_ink[..., 0], "shape": shape}  # fmt: skip


def shape_features(drawings):
    """Unit vectors N x SIZE*SIZE, one per drawing: slightly blurred ink without its mean.

    The blur lets outlines which lie half a pixel apart agree.
    """
    shapes = np.stack([d["shape"] for d in drawings])
    shapes = ndimage.gaussian_filter(shapes, (0, 0.6, 0.6))
    shapes -= shapes.mean(axis=(1, 2), keepdims=True)
    return (shapes / np.linalg.norm(shapes, axis=(1, 2), keepdims=True)).reshape(len(shapes), -1)


def similarity(features_a, features_b):
    """Similarity N x M in 0..1 of two stacks of shape features (N x D, M x D).

    The absolute correlation, so a drawing equals its negative; the largest over shifts by one pixel, as thin
    outlines of the same shape hardly overlap when one lies a pixel off.
    """
    padded = np.pad(features_b.reshape(-1, SIZE, SIZE), ((0, 0), (1, 1), (1, 1)), mode="edge")
    best = np.zeros((len(features_a), len(features_b)), np.float32)
    for dy in range(3):
        for dx in range(3):
            shifted = padded[:, dy : dy + SIZE, dx : dx + SIZE].reshape(len(features_b), -1)
            np.maximum(best, np.abs(features_a @ shifted.T), out=best)
    return best


def detect_families(by_class, listed):
    """Map each icon set to a family: the listed families, joined where sets share drawings.

    Two sets share drawings when at least SHARED_DRAWINGS of the smaller one's drawings have a near-duplicate
    in the other one. Unrelated sets reach 0.2 on simple shapes such as hearts.
    """
    family_of = {prefix: family for family, prefixes in listed.items() for prefix in prefixes}
    sizes, matches = Counter(), Counter()
    for drawings in by_class.values():
        features, sets = shape_features(drawings), np.array([d["set"] for d in drawings])
        similar = similarity(features, features) > DUPLICATE
        sizes.update(sets.tolist())
        for own, row in zip(sets, similar, strict=True):
            matches.update((str(own), str(other)) for other in np.unique(sets[row]) if other != own)
    families = {prefix: family_of.get(prefix, prefix) for prefix in sorted(sizes)}
    for (small, large), count in sorted(matches.items()):
        if sizes[small] <= sizes[large] and count >= max(15, SHARED_DRAWINGS * sizes[small]):
            old, new = families[small], families[large]
            if old != new:
                print(f"{small} shares {count} of its {sizes[small]} drawings with {large}: one family")
                families = {prefix: new if family == old else family for prefix, family in families.items()}
    return families


def drop_duplicates(drawings, seed):
    """Keep a drawing of a class only if it is not similar to one kept before; at most MAX_DRAWINGS.

    The order goes round the families, so that neither the first come nor the limit favours large families.
    """
    drawings = sorted(drawings, key=lambda d: rng_for(seed, d["set"], d["icon"]).random())
    rank, seen = {}, Counter()
    for d in drawings:
        rank[d["set"], d["icon"]] = seen[d["family"]]
        seen[d["family"]] += 1
    drawings.sort(key=lambda d: rank[d["set"], d["icon"]])  # stable: random within a rank
    features = shape_features(drawings)
    similar = similarity(features, features) > DUPLICATE
    similar |= similar.T
    kept = []
    for i in range(len(drawings)):
        if not similar[i, kept].any():
            kept.append(i)
    return [drawings[i] for i in kept[:MAX_DRAWINGS]]


def similar_across_classes(by_class):
    """Indices {class: set of int} of the drawings which are near-duplicates of a drawing of another class."""
    names, features = list(by_class), [shape_features(drawings) for drawings in by_class.values()]
    owners = [(c, i) for c, drawings in by_class.items() for i in range(len(drawings))]
    ambiguous, start = defaultdict(set), 0
    for k, c in enumerate(names[:-1]):
        start += len(features[k])
        rest = np.concatenate(features[k + 1 :])
        for row, column in np.argwhere(similarity(features[k], rest) > DUPLICATE).tolist():
            other, i = owners[start + column]
            ambiguous[c].add(row)
            ambiguous[other].add(i)
    return ambiguous


def unlike(by_class, others):
    """The drawings of classes ({class: drawings}) that are no near-duplicates of any drawing of other classes."""
    features = shape_features([d for drawings in others.values() for d in drawings])
    kept = {}
    for c, drawings in by_class.items():
        near = similarity(shape_features(drawings), features).max(1) > DUPLICATE
        kept[c] = [d for d, is_near in zip(drawings, near, strict=True) if not is_near]
    return kept


def choose_web_families(by_class, seed):
    """Choose the families of the web pool, one choice for all classes given ({class: drawings}).

    Random restarts with single flips minimise the squared distance of each class's share from WEB_SHARE.
    """
    families = sorted({d["family"] for drawings in by_class.values() for d in drawings})
    per_class = [Counter(d["family"] for d in drawings) for drawings in by_class.values()]
    counts = np.array([[count[f] for f in families] for count in per_class])
    shares = counts / counts.sum(axis=1, keepdims=True)  # classes x families
    rng, best = np.random.default_rng(seed), (np.inf, None)
    for _ in range(200):
        chosen = rng.random(len(families)) < WEB_SHARE
        cost = ((shares @ chosen - WEB_SHARE) ** 2).sum()
        while True:
            flipped = chosen ^ np.eye(len(families), dtype=bool)  # row i: the choice with family i flipped
            costs = ((flipped @ shares.T - WEB_SHARE) ** 2).sum(axis=1)
            if costs.min() >= cost - 1e-9:  # a margin, or rounding could flip a family to and fro for ever
                break
            chosen, cost = flipped[costs.argmin()], costs.min()
        if cost < best[0]:
            best = (cost, {f for f, is_web in zip(families, chosen, strict=True) if is_web})
    return best[1]


def separate_pools(drawings, web_families):
    """Set the pool of a held-out class's drawings; leave out web drawings close to those of an episode."""
    for d in drawings:
        d["pool"] = "web" if d["family"] in web_families else "episode"
    web, episode = ([d for d in drawings if d["pool"] == pool] for pool in ("web", "episode"))
    features_web, features_episode = shape_features(web), shape_features(episode)
    similar = similarity(features_web, features_episode)
    similar = np.maximum(similar, similarity(features_episode, features_web).T)  # the shift is of one side only
    return [d for d, row in zip(web, similar, strict=True) if row.max() <= DUPLICATE_ACROSS_POOLS] + episode


def write_sheets(output_dir, c, drawings):
    """Write a class's images and ink masks as sheets of tiles, COLUMNS in a row; spare tiles are white."""
    rows = -(-len(drawings) // COLUMNS)
    sheet = np.full((rows * SIZE, COLUMNS * SIZE, 3), 255, np.uint8)
    ink = np.zeros((rows * SIZE, COLUMNS * SIZE), np.uint8)
    for i, d in enumerate(drawings):
        y, x = i // COLUMNS * SIZE, i % COLUMNS * SIZE
        sheet[y : y + SIZE, x : x + SIZE] = d["image"]
        ink[y : y + SIZE, x : x + SIZE] = d["ink"]
    for folder, array in (("sheets", sheet), ("ink", ink)):
        (output_dir / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(output_dir / folder / f"{c}.png", optimize=True)


def write_attribution(path, by_class, infos, version):
    """Write the list of icon sets used, with authors, licences and the number of drawings taken from each."""
    counts = Counter(d["set"] for drawings in by_class.values() for d in drawings)
    lines = [
        "# Sources of Icons-FS",
        "",
        f"The drawings come from {len(counts)} open icon sets in the npm package `@iconify/json` {version}.",
        "Each icon was cropped to its ink, scaled to a tile of 32x32 pixels, shifted slightly, put on a",
        "background of one colour and, if of a single colour, recoloured. `drawings.json` names each source.",
        "The icons belong to their authors and stay under the licences below.",
        "",
        "| icon set | prefix | author | licence | drawings |",
        "|---|---|---|---|---:|",
    ]
    for prefix in sorted(counts, key=lambda prefix: infos[prefix]["name"].lower()):
        info = infos[prefix]
        author, licence = info["author"]["name"], info["license"]["spdx"]
        if info["author"].get("url"):
            author = f"[{author}]({info['author']['url']})"
        if info["license"].get("url"):
            licence = f"[{licence}]({info['license']['url']})"
        lines.append(f"| {info['name']} | {prefix} | {author} | {licence} | {counts[prefix]} |")
    path.write_text("\n".join(lines) + "\n")


def verify(output_dir, by_class, splits):
    """Check what was written against the promises of the data set and print a table.

    `by_class` still holds the shapes, which the near-duplicate checks need. Raises ValueError if a promise is
    broken.
    """
    records = json.loads((output_dir / "drawings.json").read_text())
    problems = []

    def check(holds, message):
        if not holds:
            problems.append(message)

    check([len(splits[s]) for s in SEEN] == [64, 16, 20], "split sizes")
    split_of = {c: s for s, names in splits.items() for c in names}
    check(set(split_of) == set(records) and len(split_of) == sum(map(len, splits.values())), "classes of the splits")
    for group in FACTS["confusable"]:
        check(len({split_of[c] for c in group}) == 1, f"confusable classes in two splits: {group}")
    licences = Counter(r["license"] for rows in records.values() for r in rows)
    check(set(licences) <= PERMISSIVE, f"licences {set(licences) - PERMISSIVE}")

    for folder in ("sheets", "ink"):
        check({f.stem for f in (output_dir / folder).iterdir()} == set(records), f"files in {folder}")

    print(f"{'class':<18}{'split':<7}{'all':>5}{'web':>5}{'episode':>9}{'families':>10}{'colour':>8}")
    pool_families = defaultdict(set)
    for c, rows in records.items():
        pools = Counter(r["pool"] for r in rows)
        least = MIN_UNSEEN_DRAWINGS if split_of[c] in UNSEEN else MIN_DRAWINGS
        check(least <= len(rows) <= MAX_DRAWINGS, f"{c}: {len(rows)} drawings")
        check(len({(r["set"], r["icon"]) for r in rows}) == len(rows), f"{c}: an icon twice")
        if split_of[c] == "base":
            check(set(pools) == {"base"}, f"{c}: pools {set(pools)}")
        elif split_of[c] in UNSEEN:
            check(set(pools) == {"episode"}, f"{c}: pools {set(pools)}")
        else:
            check(set(pools) == {"web", "episode"}, f"{c}: pools {set(pools)}")
            check(pools["episode"] >= MIN_EPISODE_DRAWINGS, f"{c}: {pools['episode']} episode drawings")
            for r in rows:
                pool_families[r["pool"]].add(r["family"])
        for folder, channels in (("sheets", "RGB"), ("ink", "L")):
            image = Image.open(output_dir / folder / f"{c}.png")
            size = (COLUMNS * SIZE, -(-len(rows) // COLUMNS) * SIZE)
            check((image.mode, image.size) == (channels, size), f"{c}: {folder} is {image.mode} {image.size}")
        families, colour = len({r["family"] for r in rows}), sum(r["style"] == "colour" for r in rows)
        counts = f"{len(rows):>5}{pools['web']:>5}{pools['episode']:>9}{families:>10}{colour:>8}"
        print(f"{c:<18}{split_of[c]:<7}{counts}")
        features = shape_features(by_class[c])
        similar = similarity(features, features)
        np.fill_diagonal(similar, 0)
        check(similar.max() <= DUPLICATE, f"{c}: near-duplicates, {similar.max():.3f}")
        web = np.array([d["pool"] == "web" for d in by_class[c]])
        if web.any():
            closest = max(similar[web][:, ~web].max(), similar[~web][:, web].max())
            check(closest <= DUPLICATE_ACROSS_POOLS, f"{c}: near-duplicates in both pools, {closest:.3f}")
    check(not pool_families["web"] & pool_families["episode"], "a family in both pools")
    check(not similar_across_classes(by_class), "near-duplicates in two classes")

    total = sum(map(len, records.values()))
    for s, names in splits.items():
        pools = Counter(r["pool"] for c in names for r in records[c])
        print(f"{s}: {len(names)} classes, {dict(pools)}")
    size = sum(f.stat().st_size for f in output_dir.rglob("*") if f.is_file())
    print(f"{total} drawings, {size / 1e6:.1f} MB; licences {dict(licences)}")
    print(f"web families: {', '.join(sorted(pool_families['web']))}")
    if problems:
        raise ValueError("Icons-FS is not as promised:\n" + "\n".join(problems))
    print("all checks passed")


def main(args):
    version = json.loads((args.iconify_dir / "package.json").read_text())["version"]
    print(f"@iconify/json {version}")
    set_files = sorted((args.iconify_dir / "json").glob("*.json"))
    icon_sets = {file.stem: json.loads(file.read_text()) for file in set_files}
    infos = {prefix: icon_set["info"] for prefix, icon_set in icon_sets.items() if "info" in icon_set}
    classes = FACTS["classes"]

    candidates = collect(icon_sets, classes, args.seed)
    with Pool(args.num_workers) as pool:
        drawings = pool.map(draw, [(candidate, args.seed) for candidate in candidates], chunksize=64)
    by_class = {c: [] for c in sorted(classes)}
    for d in drawings:
        if d is not None:
            by_class[d["class"]].append(d)
    print(f"{len(candidates)} candidates, {sum(map(len, by_class.values()))} drawings")

    splits = {s: [c for c in by_class if classes[c]["split"] == s] for s in (*SEEN, *UNSEEN)}
    families = detect_families({c: by_class[c] for s in SEEN for c in splits[s]}, FACTS["families"])
    for c, drawings in by_class.items():
        by_class[c] = drop_duplicates([d | {"family": families.get(d["set"], d["set"])} for d in drawings], args.seed)
    for group in (SEEN, UNSEEN):  # each by itself: what is unseen must not change what is seen
        names = [c for s in group for c in splits[s]]
        if group == UNSEEN:
            by_class |= unlike({c: by_class[c] for c in names}, {c: by_class[c] for s in SEEN for c in splits[s]})
        ambiguous = similar_across_classes({c: by_class[c] for c in sorted(names)})
        for c, indices in ambiguous.items():
            by_class[c] = [d for i, d in enumerate(by_class[c]) if i not in indices]
        print(f"{sum(len(by_class[c]) for c in names)} without near-duplicates; "
              f"{sum(map(len, ambiguous.values()))} dropped as alike in two classes")  # fmt: skip

    held_out = {c: by_class[c] for c in splits["val"] + splits["novel"]}
    web_families = choose_web_families(held_out, args.seed)
    for c in held_out:
        by_class[c] = separate_pools(by_class[c], web_families)
    for split, pool_name in (("base", "base"), *((s, "episode") for s in UNSEEN)):
        for c in splits[split]:
            by_class[c] = [d | {"pool": pool_name} for d in by_class[c]]

    args.output_dir.mkdir(parents=True, exist_ok=True)
    records = {}
    for c, drawings in by_class.items():
        drawings.sort(key=lambda d: (d["pool"], d["set"], d["icon"]))
        write_sheets(args.output_dir, c, drawings)
        records[c] = [
            {key: d[key] for key in ("set", "icon", "family", "style", "foreground", "background")}
            | {"license": infos[d["set"]]["license"]["spdx"], "pool": d["pool"]}
            for d in drawings
        ]
    rows = (f"{json.dumps(c)}: [\n" + ",\n".join(map(json.dumps, records[c])) + "\n]" for c in records)
    (args.output_dir / "drawings.json").write_text("{\n" + ",\n".join(rows) + "\n}\n")
    (args.output_dir / "splits.json").write_text(json.dumps(splits, indent=2) + "\n")
    write_attribution(args.output_dir / "ATTRIBUTION.md", by_class, infos, version)
    verify(args.output_dir, by_class, splits)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iconify_dir", type=Path, required=True, help="unpacked npm package @iconify/json")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for sheets, JSON, attribution")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_workers", type=int, default=2, help="processes that render")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
