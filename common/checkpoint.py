"""What a training needs to go on where it was, as one safetensors file: weights, optimizers, and facts as JSON."""

import json
from contextlib import suppress
from functools import partial

import torch
from safetensors import safe_open

from common.processes import as_main_sees
from common.records import blaming, compare_settings, save_tensors


def save_checkpoint(path, facts, **stateful):
    """Writes a checkpoint, whole: facts, {name: what JSON can hold}, and modules, or optimizers such as AdamW."""
    tensors = {}
    for name, owner in stateful.items():
        state = owner.state_dict()
        if not isinstance(owner, torch.nn.Module):
            state = {f"{i}.{k}": v for i, values in state["state"].items() for k, v in values.items()}
        tensors |= {f"{name}/{k}": v for k, v in state.items()}
    save_tensors(path, tensors, {k: json.dumps(v) for k, v in facts.items()})


def read_checkpoint(path, settings):
    """The facts and tensors of a checkpoint, or None where there is none."""
    with blaming(path), suppress(FileNotFoundError), safe_open(path, "pt") as file:  # opened once: it may be replaced
        facts = {k: json.loads(v) for k, v in (file.metadata() or {}).items()}
        compare_settings(path, facts.get("settings", settings), settings)
        return facts, {k: file.get_tensor(k) for k in file.keys()}


def load_checkpoint(path, settings, accelerator=None, **stateful):
    """Restores what `save_checkpoint` saved and returns its facts, or {} where there is none; a UserError where the
    file is damaged, or its fact "settings", if any, is not `settings`. With an accelerator, whose processes go on
    together, the main one reads for all."""
    read = partial(read_checkpoint, path, settings)
    facts, tensors = (as_main_sees(read, accelerator) if accelerator else read()) or ({}, None)
    if tensors is None:
        return facts
    with blaming(path):
        for name, owner in stateful.items():
            state = {k.partition("/")[2]: v for k, v in tensors.items() if k.startswith(f"{name}/")}
            if not isinstance(owner, torch.nn.Module):
                parameters, nested = [p for group in owner.param_groups for p in group["params"]], {}
                for k, v in state.items():
                    i, _, what = k.partition(".")
                    p = parameters[int(i)].detach()  # fused optimizers take its order of memory for granted
                    v = v if what == "step" else torch.empty_like(p, dtype=v.dtype).copy_(v.view(p.shape))
                    nested.setdefault(int(i), {})[what] = v
                state = {"state": nested, "param_groups": owner.state_dict()["param_groups"]}
            owner.load_state_dict(state)
    return facts
