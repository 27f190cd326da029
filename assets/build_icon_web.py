"""Render the icon web: drawings of thousands of names from the icon sets of Icons-FS, for models that have seen much.

As the web that a foundation model has seen, it is wide and unclean: a class is an icon's name, whatever is drawn. Out
of it stay, so that held-out classes of Icons-FS stay held out (val, novel, unseen_val, unseen):

- names that contain a word of theirs ("icons_fs_classes.json"), in singular or plural, or one listed in ALSO_DRAWN_SO;
- drawings that are near-duplicates of one of theirs;
- names of which more than MAX_ALIKE of the drawings are.

Icons that count for a base class stay out, too: Icons-FS has them. Writes one safetensors file: `images` [N, 32, 32, 3]
and `inks` [N, 32, 32] in uint8, `labels` [N], and in its metadata the names, and of each drawing its style and colours.

    npm pack @iconify/json@2.2.535 && tar xzf iconify-json-2.2.535.tgz && pip install resvg-py scipy
    python -m assets.build_icon_web --iconify_dir package --output_file outputs/icon_web.safetensors   # 10 minutes
"""

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from multiprocessing import Pool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a file, too

import numpy as np
from safetensors.numpy import save_file

from assets.build_icons_fs import FACTS, collect, draw, parse_name, rng_for, shape_features, similarity

MIN_DRAWINGS, MAX_DRAWINGS = 8, 150  # of a name; more are dropped at random
ALIKE, MAX_ALIKE = 0.9, 0.1
# What icon designers draw as a held-out class without naming it.
ALSO_DRAWN_SO = """auto automobile van taxi vehicle transport transportation shipping delivery logistics cycle cycling
biking biker parcel product inventory photography photo selfie webcam call contact delete remove recycle discard edit
write compose draft sign signature web internet world earth language translate website browser network sleep night
weather rain rainy storm drizzle snow snowy plant nature organic vegan sprout seedling forest park support service
announce announcement marketing promotion power charge charging electricity energy electric voltage song audio sound art
paint painting measure measurement dimension voice record podcast speech chemistry chemical lab laboratory science
experiment test tube directory documents loading wait waiting math accounting calculate railway rail locomotive transit
station favorite approve approved vote cooking pet animal paw kitten bear fishing seafood aquarium port harbor marine
pig money-bank savings spooky halloween knight weapon blade explosive dynamite doctor medical medicine health disease
antivirus covid infection pathogen drug clothes clothing fashion apparel wear laundry tshirts disability disabled
accessible accessibility accessable handicap carpenter construction repair tool tools maintenance mechanic fix fitness
exercise workout law legal legality court judge direction navigation navigate safari astronomy space universe orbit
ring observatory search-view fruit healthy diet bakery breakfast sandwich fastfood fast food junk snack meal dessert
seat seating furniture stool fortification palace tower rook manufacturing plant industrial production camp campsite
outdoor dentist stomatology attract attraction frozen freeze cold winter ice ac fever heat biometric identity touch id
mind think thinking intelligence ai psychology neurology travel luggage school education student celebration birthday
shower wash washing spa spy view watching zoom vision injection socket outlet charger connection adapter magician
wizardry spell thumb dislike debug malware moth spider ant bee fly mosquito
butterfly thunderstorm mist fog foggy sleet hail sunrise sunset twilight dusk tramway monorail cableway poodle carp
sledgehammer pennant bouquet lotus clover shamrock leafy cannabis polaroid cctv earbud earpod biotech explore draw fort
videocassette videocamera""".split()


def singular(word):
    return re.sub(r"(?<=[xh])es$|(?<=..[^s])s$", "", word)


def words_of(name):
    return {singular(word) for word in name.split("-")}


def collect_names(icon_sets, seed):
    """{name: candidates} without names of classes of Icons-FS, and the candidates of its held-out classes."""
    base = {c: entry for c, entry in FACTS["classes"].items() if entry["split"] == "base"}
    held_out = {c: entry for c, entry in FACTS["classes"].items() if entry["split"] != "base"}
    forbidden = [words_of(n) for c, entry in held_out.items() for n in (c, *entry["names"])]
    forbidden += [{singular(word)} for word in ALSO_DRAWN_SO]
    base_names = {n for entry in base.values() for n in entry["names"]}
    objects = {parse_name(icon)[0] for icon_set in icon_sets.values() for icon in icon_set.get("icons", ())}
    names = sorted(n for n in objects - base_names - base.keys() if n and not any(f <= words_of(n) for f in forbidden))
    wanted = base | {n: {"names": [n], "drop": []} for n in names}
    found = defaultdict(list)
    for candidate in collect(icon_sets, wanted, seed):
        found[candidate["class"]].append(candidate)
    chosen = {}
    for name in names:
        if len(found[name]) >= MIN_DRAWINGS:
            picks = rng_for(seed, name).permutation(len(found[name]))[:MAX_DRAWINGS]
            chosen[name] = [found[name][i] for i in sorted(picks)]
    return chosen, collect(icon_sets, held_out, seed)


def without_held_out(drawings, held_out):
    """The drawings by name, without those like a held-out one and without names that are mostly drawn so."""
    features = shape_features(held_out)
    parts = (drawings[start : start + 1024] for start in range(0, len(drawings), 1024))
    alike = np.concatenate([similarity(shape_features(part), features).max(1) > ALIKE for part in parts])
    by_name, near = defaultdict(list), Counter()
    for d, is_near in zip(drawings, alike, strict=True):
        near[d["class"]] += int(is_near)
        if not is_near:
            by_name[d["class"]].append(d)
    kept = {}
    for name, group in by_name.items():
        share = near[name] / (near[name] + len(group))
        if len(group) >= MIN_DRAWINGS and share <= MAX_ALIKE:
            kept[name] = group
        elif share > MAX_ALIKE:
            print(f"{name}: {near[name]} of {near[name] + len(group)} look like held-out drawings, left out")
    return kept


def main(args):
    icon_sets = {file.stem: json.loads(file.read_text()) for file in sorted((args.iconify_dir / "json").glob("*.json"))}
    icon_sets = {prefix: icon_set for prefix, icon_set in icon_sets.items() if "info" in icon_set}
    chosen, held_out = collect_names(icon_sets, args.seed)
    candidates = [candidate for group in chosen.values() for candidate in group]
    print(f"{len(candidates)} icons of {len(chosen)} names, {len(held_out)} of held-out classes", flush=True)
    with Pool(args.num_workers) as pool:
        jobs = [(candidate, args.seed) for candidate in candidates + held_out]
        drawings = pool.map(draw, jobs, chunksize=64)
    seen = [d for d in drawings[: len(candidates)] if d is not None]
    by_name = without_held_out(seen, [d for d in drawings[len(candidates) :] if d is not None])
    names = [name for name in chosen if name in by_name]
    rows = [(label, d) for label, name in enumerate(names) for d in by_name[name]]
    args.output_file.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        "images": np.stack([d["image"] for _, d in rows]),
        "inks": np.stack([d["ink"] for _, d in rows]),
        "labels": np.array([label for label, _ in rows]),
    }
    facts = [{key: d[key] for key in ("style", "foreground", "background")} for _, d in rows]
    save_file(arrays, args.output_file, {"names": json.dumps(names), "facts": json.dumps(facts)})
    print(f"{len(rows)} drawings of {len(names)} names, {args.output_file.stat().st_size / 1e6:.0f} MB")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iconify_dir", type=Path, required=True, help="unpacked npm package @iconify/json")
    parser.add_argument("--output_file", type=Path, default=Path("outputs/icon_web.safetensors"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_workers", type=int, default=2, help="processes that render")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
