"""Colour words of Icons-FS: what a drawing of one colour is painted in, and how its caption calls it."""

import numpy as np

# Colour words with their mean sRGB colours. Foregrounds are dark and backgrounds light, so nearly all pairs
# contrast.
FOREGROUNDS = {
    "red": (205, 30, 35), "orange": (225, 110, 10), "yellow": (190, 140, 0), "green": (20, 130, 50),
    "teal": (0, 125, 130), "blue": (25, 75, 200), "purple": (115, 40, 165), "pink": (215, 40, 125),
    "brown": (115, 65, 25), "black": (20, 20, 24), "grey": (85, 88, 92),
}  # fmt: skip
BACKGROUNDS = {
    "white": (252, 252, 252), "light grey": (222, 224, 226), "light yellow": (253, 243, 195),
    "light blue": (212, 229, 250), "light green": (216, 242, 214), "light pink": (252, 220, 232),
    "light orange": (253, 228, 200), "light purple": (230, 220, 247), "light teal": (205, 240, 238),
}  # fmt: skip
BACKGROUND_PROBABILITIES = [0.4] + [0.075] * 8
MIN_CONTRAST = 3.0  # WCAG 2 contrast ratio that graphical objects need to be told from their background


def contrast(colour_a, colour_b):
    """WCAG 2 contrast ratio of two sRGB colours in 0..255, from 1 to 21."""
    linear = [np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
              for c in (np.asarray(colour_a) / 255, np.asarray(colour_b) / 255)]  # fmt: skip
    dark, light = sorted(float(c @ [0.2126, 0.7152, 0.0722]) for c in linear)
    return (light + 0.05) / (dark + 0.05)


def draw_colours(rng):
    """Random (foreground word, background word, foreground, background); colours are float RGB in 0..255.

    In 15% of the drawings the two are exchanged, for light objects on a dark ground.
    """
    while True:
        words = [rng.choice(list(FOREGROUNDS)), rng.choice(list(BACKGROUNDS), p=BACKGROUND_PROBABILITIES)]
        colours = [np.clip(FOREGROUNDS[words[0]] + rng.normal(0, 12, 3), 0, 255),
                   np.clip(BACKGROUNDS[words[1]] + rng.normal(0, 5, 3), 0, 255)]  # fmt: skip
        if words[1].split()[-1] == words[0]:  # "blue on light blue" would be one colour word for two colours
            continue
        if rng.random() < 0.15:
            words, colours = words[::-1], colours[::-1]
        if contrast(*colours) >= MIN_CONTRAST:
            return str(words[0]), str(words[1]), *colours
