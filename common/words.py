"""New words in the vocabulary of a text-to-image model: one a class, of one or more tokens (2208.01618)."""

import unicodedata

import torch

from common.cli import UserError


def placeholder_token(name):
    """The new word of a class. Lower case and without spaces, since CLIP's tokenizer knows no other."""
    return "<" + "-".join(unicodedata.normalize("NFC", name).lower().split()) + ">"


def add_new_words(pipe, names, args):
    """Adds the classes' new words to the vocabulary, `<name>`, `<name>_1`, ... as diffusers loads them. Returns the
    words, the id of the first new token, start vectors [num_classes, num_vectors, D], and initialiser words."""
    starts, initializers = zip(*(initial_vector(pipe, name, args) for name in names))
    words = [placeholder_token(name) for name in names]
    tokens = [word if k == 0 else f"{word}_{k}" for word in words for k in range(args.num_vectors)]
    first_id = len(pipe.tokenizer)
    if pipe.tokenizer.add_tokens(tokens) != len(tokens):
        raise UserError(f"The tokenizer already knows some of {', '.join(tokens)}: rename those class folders.")
    expected = list(range(first_id, first_id + len(tokens)))
    if [i for t in tokens for i in pipe.tokenizer(t, add_special_tokens=False).input_ids] != expected:
        raise UserError(f"The tokenizer does not keep {', '.join(words)} apart: rename those class folders.")
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    return words, first_id, torch.stack(starts)[:, None].repeat(1, args.num_vectors, 1), initializers


def initial_vector(pipe, name, args):
    """The embedding [D] that a class's vectors start from, and its words: those of --initializer_token, else those
    of the class name that the tokenizer knows as one token, else --fallback_token's. Of several words the mean."""
    for option in ("initializer_token", None, "fallback_token"):
        text = getattr(args, option) if option else name.replace("-", " ").replace("_", " ")
        ids = {w: pipe.tokenizer(w, add_special_tokens=False).input_ids for w in (text or "").split()}
        words = [word for word in ids if len(ids[word]) == 1 and ids[word] != [pipe.tokenizer.unk_token_id]]
        if option and text is not None and (not words or len(words) < len(ids)):
            raise UserError(f"--{option} {text!r}: give words that this model's tokenizer knows as one token each.")
        if words:
            rows = [ids[word][0] for word in words]
            return pipe.text_encoder.get_input_embeddings().weight[rows].detach().mean(0), " ".join(words)


def require_distinct_words(names):
    """Raises a UserError where two classes would have the same new word."""
    by_word = {}
    for name in names:
        by_word.setdefault(placeholder_token(name), []).append(name)
    for word, sharers in by_word.items():
        if len(sharers) > 1:
            raise UserError(f"The classes {' and '.join(sharers)} would share the word {word}: rename one's folder.")
