"""Other people's programs, opening exports: `python clients.py WORK.json with|without`, one process, one JSON object on stdout.

WORK.json: {"exports": {name: {"folder", "program": null|onnx|pt2, "classes": bool}}, "expected": a .safetensors of images and what the trained
models give for them, "scratch": a folder}. "without": `ssl_locat` cannot be imported in this process. Result: {client: {export: difference or
the error's last line}}, the greatest difference relative to the largest value.
"""

import importlib
import json
import sys
import time
import warnings
from pathlib import Path

warnings.simplefilter("ignore")  # the clients' own; what they give is what counts
work, mode = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
if mode == "without":
    sys.modules["ssl_locat"] = None  # every import of it fails, wherever it is installed

import timm  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

if mode == "with":
    importlib.import_module("ssl_locat.models")  # registers the models with timm
expected = load_file(work["expected"])
images = expected["images"]
trust = {"trust_remote_code": True}
torch.set_num_threads(1)


def difference(given, name: str) -> float:
    wanted = expected[name]
    assert given.shape == wanted.shape, f"shape {tuple(given.shape)}, not {tuple(wanted.shape)}"
    return float((given - wanted).abs().max() / wanted.abs().max())


def by_timm(name, folder, kind):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return max(difference(model(images), f"{name}.out"), difference(model.forward_features(images), f"{name}.tokens"))


def by_timm_features(name, folder, kind):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True, out_indices=[-1]).eval()
    return difference(model(images)[-1], f"{name}.map")


def by_timm_file(name, folder, kind):
    """timm's ways to a file of weights; of a folder they say that there is none."""
    config = json.loads(Path(folder, "config.json").read_text())
    options = {**config["model_args"], "num_classes": config["num_classes"]}
    file = f"{folder}/model.safetensors"
    given = timm.create_model(config["architecture"], **options, checkpoint_path=file).eval()
    loaded = timm.create_model(config["architecture"], **options).eval()
    timm.models.load_checkpoint(loaded, file)
    for ask in (lambda: timm.models.load_checkpoint(loaded, folder), lambda: timm.create_model("vit_tiny_patch16_224", checkpoint_path=folder)):  # fmt: skip
        try:
            ask()
        except FileNotFoundError:
            continue
        raise AssertionError("timm opens a folder by checkpoint_path now: say so in docs/clients.md and the model card")
    return max(difference(model(images), f"{name}.out") for model in (given, loaded))


def auto_model(name, folder, kind, **options):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, **options).eval()
    out = model(images)
    again = Path(work["scratch"]) / f"{name}_{mode}_{len(options)}"
    model.save_pretrained(again)
    reloaded = AutoModel.from_pretrained(again, **options).eval()(images)
    assert torch.equal(reloaded.pooler_output, out.pooler_output), "saved and reloaded, it gives something else"
    return max(difference(out.pooler_output, f"{name}.class"), difference(out.last_hidden_state, f"{name}.tokens"))


def auto_classifier(name, folder, kind, **options):
    from transformers import AutoModelForImageClassification

    if kind["classes"]:
        return difference(AutoModelForImageClassification.from_pretrained(folder, **options).eval()(images).logits, f"{name}.out")
    # a new classifier on the features: `base` is the same network
    model = AutoModelForImageClassification.from_pretrained(folder, num_labels=7, **options).eval()
    assert model(images).logits.shape == (len(images), 7)
    return difference(model.timm_model.forward_features(images), f"{name}.tokens")


def auto_backbone(name, folder, kind):
    from transformers import AutoBackbone, TimmBackboneConfig

    config = TimmBackboneConfig(backbone=f"local-dir:{folder}", out_indices=[-1])
    return difference(AutoBackbone.from_config(config, pretrained=True).eval()(images).feature_maps[-1], f"{name}.map")


def auto_processor(name, folder, kind):
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder)
    picture = Image.fromarray(expected["picture"].numpy())
    return difference(processor(picture, return_tensors="pt")["pixel_values"], f"{name}.pixels")


def pipeline_of(name, folder, kind, **options):
    from transformers import pipeline

    extract = pipeline("image-feature-extraction", model=str(folder), **options)
    picture = Image.fromarray(expected["picture"].numpy())
    return difference(torch.tensor(extract(picture, pool=True)), f"{name}.picture_class")


def by_onnxruntime(name, folder, kind):
    import onnxruntime

    session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
    axes = session.get_inputs()[0].shape
    assert axes == ["batch", 3, "height", "width"], axes
    given = session.run(["class_token", "patch_tokens"], {"images": images.numpy()})
    odd = expected["images"][:, :, :-1].numpy()
    try:
        session.run(None, {"images": odd})
    except Exception:
        return max(difference(torch.from_numpy(g), f"{name}.{w}") for g, w in zip(given, ("class", "raw"), strict=True))
    raise AssertionError("a side that the patch does not divide was cut off in silence")


def by_torch_export(name, folder, kind):
    start = time.perf_counter()
    module = torch.export.load(f"{folder}/model.pt2").module()
    loaded = time.perf_counter()
    given = module(images)
    seconds["load model.pt2"], seconds["run model.pt2"] = loaded - start, time.perf_counter() - loaded
    try:
        module(images[:, :, :-1])
    except Exception:
        return max(difference(g, f"{name}.{w}") for g, w in zip(given, ("class", "raw"), strict=True))
    raise AssertionError("a side that the patch does not divide was cut off in silence")


def by_ssl_locat(name, folder, kind):
    import ssl_locat

    return difference(ssl_locat.features(ssl_locat.load_backbone(folder), images), f"{name}.class")


CLIENTS = {
    "timm": by_timm,
    "timm, features_only": by_timm_features,
    "timm, `checkpoint_path=` and `load_checkpoint` of the file": by_timm_file,
    "AutoModel, saved and reloaded": auto_model,
    "AutoModelForImageClassification": auto_classifier,
    "AutoBackbone.from_config": auto_backbone,
    "AutoImageProcessor": auto_processor,
    "pipeline image-feature-extraction": pipeline_of,
    "AutoModel, trust_remote_code": lambda *args: auto_model(*args, **trust),
    "AutoModelForImageClassification, trust_remote_code": lambda *args: auto_classifier(*args, **trust),
    "pipeline, trust_remote_code": lambda *args: pipeline_of(*args, **trust),
    "ssl_locat.load_backbone": by_ssl_locat,
    "onnxruntime": by_onnxruntime,
    "torch.export.load": by_torch_export,
}
seconds: dict[str, float] = {}
results: dict[str, dict] = {}
# trust_remote_code comes last: it registers the model with timm, for everybody in this process
for client, function in sorted(CLIENTS.items(), key=lambda item: "trust" in item[0]):
    for name, kind in work["exports"].items():
        program = {"onnxruntime": "onnx", "torch.export.load": "pt2"}.get(client)
        if program != kind["program"]:
            continue
        try:
            with torch.inference_mode():
                results.setdefault(client, {})[name] = function(name, kind["folder"], kind)
        except Exception as error:
            results.setdefault(client, {})[name] = (
                f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
            )
print(
    json.dumps(
        {"results": results, "seconds": seconds, "ssl_locat": "ssl_locat" in sys.modules and sys.modules["ssl_locat"] is not None}
    )
)
