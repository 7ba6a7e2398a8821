"""For which models of timm, torchvision and transformers does `attach` find the classifier?

Every third architecture that timm lists, every one of torchvision, and every class for classifying texts or images that transformers knows,
is built without memory (device ``meta``; transformers at four layers, random configuration) and searched. timm says itself
which layer is its classifier (``pretrained_cfg``), transformers and torchvision how many outputs it has: that is the check.

python benchmarks/attach_coverage.py --out benchmarks/results/attach_coverage.json      # about 4 minutes
"""

import argparse
import json
import platform
from pathlib import Path

import torch

from equiframe import InputError, __version__
from equiframe.integrate import find_classifier


def timm_models(every: int):
    import timm

    for name in timm.list_models()[::every]:
        yield name, lambda name=name: timm.create_model(name)


def torchvision_models(every: int):
    from torchvision import models

    for module in (models, models.video):
        for name in models.list_models(module=module):
            yield name, lambda name=name: models.get_model(name)


def transformers_models(every: int):
    from transformers.models.auto import modeling_auto as auto

    auto_classes = (auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING)
    found = [(config, mapping[config]) for mapping in auto_classes for config in mapping]
    for config, classes in found:
        for made in classes if isinstance(classes, (tuple, list)) else [classes]:
            yield made.__name__, lambda made=made, config=config: made(small(config()))


def small(config):
    """The configuration with four layers and seven labels."""
    for part in (config, config.get_text_config()):
        for name in (
            "num_hidden_layers",
            "num_layers",
            "n_layer",
            "encoder_layers",
            "decoder_layers",
            "num_decoder_layers",
        ):
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, min(4, getattr(part, name)))
        if getattr(part, "layer_types", None):
            part.layer_types = part.layer_types[:4]
    config.num_labels = 7
    return config


def as_its_library_says(library: str, model: torch.nn.Module, place: str) -> bool:
    if library == "timm":
        return model.pretrained_cfg.get("classifier") == place
    outputs = getattr(model.get_submodule(place), "out_features", None)
    return outputs == (7 if library == "transformers" else 1000) or (outputs == 400 and library == "torchvision")


def search(library: str, name: str, make) -> dict[str, object]:
    try:
        try:
            with torch.device("meta"):
                model = make()
        except NotImplementedError:  # builders that compute with tensors
            model = make()
    except Exception as error:
        return {"name": name, "result": "not built", "why": f"{type(error).__name__}: {error}"[:160]}
    try:
        place = find_classifier(model)
    except InputError as error:
        return {"name": name, "result": "refused", "why": str(error)}
    right = as_its_library_says(library, model, place)
    return {"name": name, "result": "as its library says" if right else "otherwise", "place": place}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--every", type=int, default=3, help="timm: only each n-th architecture")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    libraries = {"timm": timm_models, "torchvision": torchvision_models, "transformers": transformers_models}
    results = {}
    for library, models in libraries.items():
        results[library] = [search(library, name, make) for name, make in models(chosen.every)]
        kinds = [row["result"] for row in results[library]]
        print(f"{library}: {len(kinds)} models: " + ", ".join(f"{kinds.count(k)} {k}" for k in sorted(set(kinds))))
    if chosen.out:
        import timm
        import torchvision
        import transformers

        versions = {m.__name__: m.__version__ for m in (torch, timm, torchvision, transformers)}
        about = {"equiframe": __version__, **versions, "machine": platform.processor() or platform.machine()}
        chosen.out.write_text(json.dumps({"about": about, "models": results}, indent=1))


if __name__ == "__main__":
    main()
