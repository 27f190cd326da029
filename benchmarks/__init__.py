"""Measurements of the scripts, each started as a file or as a module."""

from common import datasets


def write_supports(dataset, num_ways, num_shots, seed, index, folder):
    """Writes the supports of an episode as `folder`/<class>/*.png."""
    order = datasets.draw_episode(dataset, num_ways, num_shots, seed, index)
    datasets.write_images(dataset, {name: drawn[:num_shots] for name, drawn in order.items()}, folder)
