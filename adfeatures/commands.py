"""What each ``adfeatures`` command does with its options. It returns an exit code.

What needs torch is imported by the commands that need it, so that help and listing answer at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from . import __version__, catalog
from .console import DONE, NOTHING_DONE, SOME_FAILED
from .documents import dumps
from .errors import InputError, ReferencesError

# As many names as a warning tells.
_SHOWN = 5
_UNDECIDED = "no decision: one reference gives no threshold. Give more, or --normals"


def list_models(options: argparse.Namespace) -> int:
    """List the models."""
    names = catalog.list_models(options.filter, options.pretrained)
    if not names:
        print(f"adfeatures: no model matches {options.filter!r}; try '*{options.filter}*'", file=sys.stderr)
    if names or options.json:
        print(dumps(names) if options.json else "\n".join(names))
    return DONE


def show_model(options: argparse.Namespace) -> int:
    """Show levels, preprocessing, origin and licenses of a model, or installed versions."""
    if options.model is None and options.backbone is None:
        show(_versions(), options.json)
        return DONE
    name, backbone = options.model, None
    if options.backbone is not None:
        name = catalog.with_backbone(name, options.backbone)
    arch, tag = catalog.find_model(name)
    if tag and catalog.MODELS[arch].any_backbone:
        from .resolve import chosen_backbone

        tag, found = chosen_backbone(tag)
        name, backbone = f"{arch}.{tag}", found.entry
    show(catalog.describe(name, backbone), options.json)
    return DONE


def _versions() -> dict[str, Any]:
    import platform
    from importlib.metadata import version

    libraries = ("torch", "timm", "huggingface-hub", "safetensors", "pillow", "numpy")
    installed = {library: version(library) for library in libraries}
    return {
        "adfeatures": __version__,
        "python": platform.python_version(),
        **installed,
        "platform": platform.platform(),
    }


def download(options: argparse.Namespace) -> int:
    """Download and verify the weights of a model, for use without a network."""
    from .checkpoints import sha256
    from .resolve import published_files

    files, missing = published_files(options.model, options.cache_dir)
    if missing:
        print(f"adfeatures: {missing}", file=sys.stderr)
    show({str(path): sha256(path) for path in files}, options.json)
    return DONE


def convert(options: argparse.Namespace) -> int:
    """Turn a published checkpoint into safetensors."""
    from .locks import only_run_for
    from .resolve import convert_checkpoint

    with only_run_for(options.destination):
        checkpoint = convert_checkpoint(options.source, options.destination, options.model)
    show(
        {
            "file": options.destination,
            "tensors": len(checkpoint.state_dict),
            **checkpoint.metadata,
            **checkpoint.metrics,
        },
        options.json,
    )
    return DONE


def fit(options: argparse.Namespace) -> int:
    """Make a reference bank with a threshold from normal images."""
    from .bank_files import check_destination
    from .locks import only_run_for

    check_destination(options.bank)
    with only_run_for(options.bank):
        facts = _fit_bank(options)
    show({"bank": options.bank, **facts}, options.json)
    return DONE


def _fit_bank(options: argparse.Namespace) -> dict[str, Any]:
    from .detectors import model_of, reading_of, set_references
    from .sources import list_images
    from .thresholds import expectation

    model = model_of(options, options.model)
    further = reading_of(options) | {"coreset": options.coreset}
    set_references(model, options.references, **further)
    normals = list_images(options.normals, recursive=options.recursive) if options.normals else None
    if normals and len(model.references) > 1:
        raise InputError("--normals can be used with one product only. Fit a bank for each product instead.")
    for product, bank in model.references.items():
        if normals or bank.num_images > 1:
            model.fit_threshold(options.quantile, normals=normals, product=product)
    model.save_references(options.bank)
    facts = {
        product: {
            "references": bank.num_images,
            "geometry": str(bank.record.geometry),
            "rotations": bank.record.rotations,
            "threshold": bank.threshold,
            "quantile": bank.quantile,
            "normal_scores": len(bank.record.normal_scores),
            "expect": expectation(bank.quantile, len(bank.record.normal_scores)) if bank.quantile else _UNDECIDED,
        }
        for product, bank in model.references.items()
    }
    return {"model": model.name, "products": facts}


def score(options: argparse.Namespace) -> int:
    """Score images against references, with heat maps."""
    from .detectors import detector_of
    from .engines import engine_of, ranks, serve
    from .inspection import inspect
    from .worklist import find_images

    with ranks() as rank:
        if rank:
            serve(options)
            return DONE
        files = find_images(options.images, options.recursive, options.manifest)
        model = detector_of(options)
        result = inspect(
            model,
            files,
            options.output,
            product=options.product,
            threshold=options.threshold,
            batch_size=options.batch_size,
            workers=options.workers,
            resume=options.resume,
            engine=engine_of(options, model),
        )
    return _report(result.summary, options)


def export(options: argparse.Namespace) -> int:
    """Write a model with its references to an ONNX file."""
    from .detectors import model_of_bank
    from .export import check_output, export_onnx

    check_output(options.output)
    model = model_of_bank(options)
    bank = model.bank(options.product)
    if options.threshold is not None:
        bank.threshold, bank.record.quantile = options.threshold, None
    if bank.threshold is None and bank.num_images == 1:
        raise ReferencesError(
            f"{options.bank} has no threshold, since a single reference gives none, and a file without one decides "
            "nothing. Fit it with more references or --normals, or name a --threshold."
        )
    facts = export_onnx(
        model,
        options.output,
        product=options.product,
        uint8=options.uint8,
        features=options.features,
        batch_size=options.batch_size,
    )
    shown = ("model", "product", "input", "img_size", "threshold", "color_scale", "num_images")
    show({"file": options.output, **{name: facts[name] for name in shown}}, options.json)
    return DONE


def demo(options: argparse.Namespace) -> int:
    """Score the sample images of the package."""
    from .demo import run_demo

    return _report(run_demo(options.output), options)


def _report(summary: dict[str, Any], options: argparse.Namespace) -> int:
    if references := summary["scored_references"]:
        more = f" and {len(references) - _SHOWN} more" if len(references) > _SHOWN else ""
        print(
            f"adfeatures: warning: scored images that are references: {', '.join(references[:_SHOWN])}{more}",
            file=sys.stderr,
        )
    if options.json:
        print(dumps(summary))
    else:
        decided = (
            "no threshold (one reference)" if summary["threshold"] is None else f"threshold {summary['threshold']:.4g}"
        )
        print(f"{summary['scored']} of {summary['images']} images scored with {summary['model']}, {decided}")
        if summary["threshold"] is not None:
            print(f"{summary['anomalous']} anomalous, {summary['normal']} normal")
        for name in ("image_auroc", "pixel_auroc"):
            if name in summary:
                print(f"{name.replace('_', ' ').replace('auroc', 'AUROC')}: {summary[name]:.3f}")
        print(f"results: {options.output} (scores.csv, scores.jsonl, overlays/, worst.png, summary.json)")
    for error in summary["errors"]:
        print(f"adfeatures: not scored: {error}", file=sys.stderr)
    return NOTHING_DONE if not summary["scored"] else SOME_FAILED if summary["failed"] else DONE


def show(facts: dict[str, Any], as_json: bool) -> None:
    """Print facts as lines, or as JSON."""
    print(dumps(facts) if as_json else "\n".join(_table(facts)))


def _table(facts: dict[str, Any], indent: str = "") -> Iterator[str]:
    """Facts as lines, those of a fact indented below its name."""
    width = max((len(key) for key in facts), default=0)
    for key, value in facts.items():
        if isinstance(value, dict):
            yield f"{indent}{key}"
            yield from _table(value, f"{indent}  ")
            continue
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        # A header may hold a fingerprint of many images.
        yield f"{indent}{key:<{width}}  {text if len(text) < 10_000 else f'{text[:60]}... ({len(text)} characters)'}"
