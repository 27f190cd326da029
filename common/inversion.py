"""What tint_invert.py writes of a class: inversion.json, its learned word, its images' latents and null-text."""

import argparse
from contextlib import suppress
from pathlib import Path
from statistics import mean

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from common import records
from common.cli import UserError, note, refuse_others, refusing, require_folder
from common.images import save_grid
from common.words import require_distinct_words

RECORD, CLASSES = "inversion.json", "classes.json"  # of a class that is done; of those that are being inverted
EMBEDS, NULL_TEXT = "learned_embeds.safetensors", "null_text.safetensors"
TENSORS = ("latents", "null_offsets", "image_latents")  # of each image
NEEDED = {"pretrained_model_name_or_path", "revision", "variant", "model_weights", "num_inference_steps",
          "guidance_scale", "prompt", "resolution", "support_images"}  # fmt: skip
BAD_DB, GOOD_DB = 20.0, 25.0  # PSNR of a picture that is no longer of the same thing, and of one that surely is
FACTS = {"settings": dict, "class": str, "support_dir": str, "placeholder_token": str, "initializer_token": str,
         "images": list, "image_size": int, "original_size": int, "textual_inversion_loss": list,
         "null_text_steps": list, "reconstruction_psnr_db": dict}  # fmt: skip


def load(path, device):
    """The tensors of a safetensors file of this or an interrupted run, or a UserError that names it."""
    with records.blaming(path):
        return load_file(path, device=str(device))


def read_inversion(folder):
    """The facts in inversion.json of a class's folder, or a UserError where the file is damaged, or of another class: a
    class is its folder's name, whatever the file says."""
    path = Path(folder) / RECORD
    facts = records.read_json(path)
    try:
        wrong = [name for name, kind in FACTS.items() if not isinstance(facts[name], kind)]
        wrong += sorted(NEEDED - facts["settings"].keys())
        quality, curve = facts["reconstruction_psnr_db"], facts["textual_inversion_loss"]
        counts = {len(values) for values in (facts["images"], quality["vae"], quality["null_text"])}
        if wrong or counts != {len(set(map(str, facts["images"])))} or not isinstance(curve[-1][0], int):
            raise ValueError(", ".join(wrong) or "images, or what is said of them")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): move it away and invert again.") from error
    if facts["class"] != path.parent.name:
        raise UserError(f"{path} is of the class {facts['class']!r}: its folder should have that name.")
    return facts


def open_inversion(folder):
    """The facts of one class's inversion, NULL_TEXT opened as `null_text`, and `fingerprints` of word and images."""
    facts = read_inversion(folder)
    with refusing(f"{folder} is no inversion ({{error}}): move it away and invert again."):
        words = load(folder / EMBEDS, "cpu")
        facts["null_text"] = tensors = safe_open(folder / NULL_TEXT, "pt")
        supports = {image: [(k, tensors.get_slice(k)[i]) for k in TENSORS] for i, image in enumerate(facts["images"])}
        if list(words) != [facts["placeholder_token"]]:
            raise ValueError(f"its word is not {facts['placeholder_token']}")
        if tensors.get_slice("null_offsets").get_shape()[1] != facts["settings"]["num_inference_steps"]:
            raise ValueError("its null-text is of other steps")
    facts["fingerprints"] = {
        f"{folder.name}/{image}": records.fingerprint_tensors(parts) for image, parts in supports.items()
    }
    facts["fingerprints"][folder.name] = records.fingerprint_tensors(words.items())
    return facts


def require_supports(record, before, folder):
    """Raises a UserError where photos of a class have been changed or taken away since they were inverted."""
    with records.blaming(record):
        now = {name: records.fingerprint([folder / name]) for name in before if (folder / name).is_file()}
        if changed := "; ".join(records.changed_files(before, now)):
            raise UserError(f"{record} is of other photos than {folder} holds now ({changed}): put them back, or "
                            "invert those that are there into another folder.")  # fmt: skip


def open_inversions(args):
    """{class name: facts of its inversion, with its null-text file opened}, from the folders of tint_invert.py, or a
    UserError. A class whose folder of supports was taken away since is left out."""
    root = require_folder(args.inversion_dir, "It should hold what tint_invert.py writes.")
    paths = sorted(root.glob(f"*/{RECORD}"))
    if not paths:
        raise UserError(f"{root} holds no <class>/{RECORD}: run tint_invert.py --output_dir {root} first.")
    folders = {record.parent.name: open_inversion(record.parent) for record in paths}
    for facts in folders.values():
        facts["support_dir"] = args.support_dir or facts["support_dir"]  # which may have moved since
    supports = {name: Path(facts["support_dir"]) for name, facts in folders.items()}
    for folder in set(supports.values()):
        records.keep_apart(argparse.Namespace(output_dir=args.output_dir, support_dir=str(folder)))
    if any((folder / name).is_dir() for name, folder in supports.items()):  # else all have moved
        for name in [name for name, folder in supports.items() if folder.is_dir() and not (folder / name).is_dir()]:
            note(f"{name} is left out: {supports[name] / name}, from which it was inverted, is gone.")
            del folders[name]
    for name, facts in folders.items():
        if (supports[name] / name).is_dir():
            require_supports(root / name / RECORD, facts["settings"]["support_images"], supports[name])
    first, *others = (facts["settings"] | {"support_images": None} for facts in folders.values())
    if different := [text for settings in others for text in records.differences(first, settings)]:
        raise UserError(f"The classes of {root} were inverted with different settings ({different[0]}): do it alike.")
    require_distinct_words(folders)
    if args.method == "null_text" and "{}" in first["prompt"]:
        raise UserError(f"--method null_text needs an inversion without a learned word, and {root} has one: use "
                        'tint_invert.py --prompt "a photo" --max_train_steps 0.')  # fmt: skip
    if args.method in ("textual_inversion", "img2img") and "{}" not in first["prompt"]:
        raise UserError(f"--method {args.method} needs a learned word, and {root} has none: use --method null_text.")
    return folders


def write_inversion(folder, facts, vectors, tensors, pictures, known=None):
    """Writes what was found of a class, or adds it to what is `known` of other images of the class: its word's vectors
    [num_vectors, D], tensors {"latents": z_T [S, C, h, w], "null_offsets": [S, T, L, D], "image_latents": z_0
    [S, C, h, w]}, and pictures, rows of images."""
    picture = f"reconstruction_from_{len(known['images'])}.png" if known else "reconstruction.png"
    quality = facts["reconstruction_psnr_db"]
    titles = [f"{kind.replace('_', '-')} {mean(values):.1f} dB" for kind, values in quality.items()]
    names = [Path(name).stem for name in facts["images"]]  # of little room, the ends of names say most
    save_grid(pictures, folder / picture, [facts["class"], *titles], names)
    if known:
        facts |= {k: known[k] + facts[k] for k in ("images", "null_text_steps")}
        facts |= {k: min(known[k], facts[k]) for k in ("image_size", "original_size")}
        facts |= {k: known[k] for k in ("initializer_token", "textual_inversion_loss")}
        facts["added"] = facts["images"][len(known["images"]) - len(known.get("added", [])) :]
        facts["reconstruction_psnr_db"] = {k: known["reconstruction_psnr_db"][k] + x for k, x in quality.items()}
        before = load(folder / NULL_TEXT, vectors.device)
        tensors = {k: torch.cat([before[k][: len(known["images"])], x]) for k, x in tensors.items()}
    records.save_tensors(folder / EMBEDS, {facts["placeholder_token"]: vectors})
    records.save_tensors(folder / NULL_TEXT, tensors)
    records.write_json(folder / RECORD, facts)  # last: it marks the class as done


def name_of(path, class_name, args):
    """What an image is called in the record of its class: its path below the class's folder."""
    return path.relative_to(Path(args.support_dir) / class_name).as_posix()


def partial_folder(names, settings, args, added=()):
    """Where an inversion of these classes and settings, or of images `added` to one, keeps what it has done so far."""
    key = records.digest({name: settings[name] for name in names}, args.null_text_batch_size, *added)
    return Path(args.output_dir) / f".partial-{key}"


def begin(names, settings, args, added=()):
    """Makes the `partial_folder` of an inversion that begins, or goes on, and returns it."""
    folder = partial_folder(names, settings, args, added)
    records.write_json(folder / CLASSES, names)
    return folder


def interrupted(root):
    """{folder: names} of the groups of classes whose inversion was begun and not ended."""
    groups = {}
    for path in sorted(root.glob(f".partial-*/{CLASSES}")):
        with records.blaming(path), suppress(FileNotFoundError):  # another run may just end it
            groups[path.parent] = records.read_json(path, list)
            "".join(groups[path.parent])
    return groups


def is_done(root, names):
    return all((root / name / RECORD).is_file() for name in names)


def batches(root, new, settings, args, num_processes):
    """The `new` classes in groups that are inverted together. An interrupted one stays: last bits depend on it."""
    found = interrupted(root)
    begun = {k: g for k, g in found.items() if not is_done(root, g) and set(g) <= settings.keys()}
    begun = [group for folder, group in begun.items() if folder == partial_folder(group, settings, args)]
    rest = [name for name in new if not any(name in group for group in begun)]
    others = [root / name for name in rest if not any(name in group for group in found.values())]
    refuse_others(*(folder / EMBEDS for folder in others if not (folder / NULL_TEXT).is_file()))
    size = max(1, min(args.class_batch_size, -(-len(rest) // num_processes)))  # so that each process has some
    return begun + [rest[i : i + size] for i in range(0, len(rest), size)]


def tidy(root):
    """Removes what interrupted inversions, with other settings, have left of classes that are inverted now."""
    for folder, names in interrupted(root).items():
        if is_done(root, names):
            records.remove_folder(folder)


def describe(root, classes, args):
    """Lines that say what became of the classes: how each word was learned, and which images come back badly."""
    inverted = {name: read_inversion(root / name) for name in classes}
    for name, facts in inverted.items():
        psnr, start = facts["reconstruction_psnr_db"], facts["initializer_token"]
        words = name.replace("-", " ").replace("_", " ").split()
        unknown = [] if args.initializer_token else [word for word in words if word not in start.split()]
        steps = facts["textual_inversion_loss"][-1][0]
        yield (
            f'{name}: {facts["placeholder_token"]} starts from "{start}"'
            + (f" (not in the tokenizer: {', '.join(unknown)})" if unknown else "")
            + (f", converged at step {steps}" if steps < args.max_train_steps else f", {steps} steps")
            + f"; images come back at {mean(psnr['null_text']):.1f} dB, by the VAE alone at {mean(psnr['vae']):.1f}; "
            f"see {root / name / 'reconstruction.png'}"
        )
        for image, value, vae in sorted(zip(facts["images"], psnr["null_text"], psnr["vae"]), key=lambda row: row[1]):
            if value < max(BAD_DB, min(vae - 3, GOOD_DB)):
                yield f"  {image} comes out badly: {value:.1f} dB, by the VAE alone {vae:.1f}"
    vae = [x for facts in inverted.values() for x in facts["reconstruction_psnr_db"]["vae"]]
    side, bad = min(facts["original_size"] for facts in inverted.values()), sum(x < BAD_DB for x in vae)
    if side >= 4 * args.resolution or bad > len(vae) / 2:
        yield (
            f"{args.pretrained_model_name_or_path} draws {args.resolution} x {args.resolution} pixels, these images "
            f"have {side} and more, and its VAE gives {bad} of {len(vae)} back badly. A model draws what it has "
            "learned: for other images, name one that knows such with --pretrained_model_name_or_path."
        )
    for path in root.glob(f"*/{RECORD}"):
        if path.parent.name not in classes:
            yield f"{path.parent.name} was inverted before, and is not in {args.support_dir}: {path.parent} stays."
