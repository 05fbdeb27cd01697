"""The ``adfeatures`` command.

What needs torch is imported by the commands that need it, so that help and listing answer at once.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from . import __version__, catalog
from .console import INTERRUPTED, console
from .documents import dumps
from .errors import AdfeaturesError, InputError, ReferencesError

DONE, SOME_FAILED, NOTHING_DONE = 0, 1, 2
# As many names as a warning tells.
_SHOWN = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 if all was done, 1 if some images failed, 2 if nothing could be done."""
    with console(), warnings.catch_warnings():
        options = _parser().parse_args(arguments)
        warnings.simplefilter("default", UserWarning)
        warnings.filterwarnings("ignore", module=r"PIL\.")  # Of metadata, without a file's name.
        warnings.showwarning = lambda message, *_: print(f"adfeatures: warning: {message}", file=sys.stderr)
        try:
            return options.run(options)
        except AdfeaturesError as error:
            print(f"adfeatures: error: {error}", file=sys.stderr)
            return NOTHING_DONE
        except KeyboardInterrupt:
            print("adfeatures: interrupted. Results written so far are kept.", file=sys.stderr)
            return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="adfeatures", description="Pretrained features for industrial anomaly detection."
    )
    parser.add_argument("--version", action="version", version=f"adfeatures {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    listing = _command(commands, "list", _list, "list the models")
    listing.add_argument("filter", nargs="?", default="*", help='pattern such as "*dinov2*"')
    listing.add_argument("--pretrained", action="store_true", help="list every set of weights, as name.tag")

    info = _command(
        commands, "info", _info, "show levels, preprocessing, origin and licenses of a model, or installed versions"
    )
    info.add_argument("model", nargs="?", help="default: show the installed versions, for bug reports")
    info.add_argument("--backbone", metavar="NAME", help="backbone of residual_timm")

    download = _command(
        commands, "download", _download, "download and verify the weights of a model, for use without a network"
    )
    download.add_argument("model", help="name or name.tag")
    download.add_argument("--cache-dir", metavar="DIR", help="where to keep them (default: that of huggingface_hub)")

    convert = _command(commands, "convert", _convert, "turn a published checkpoint into safetensors")
    convert.add_argument("source", help="such as checkpoints_pro_norm.pth")
    convert.add_argument("destination", help="file ending in .safetensors")
    convert.add_argument("--model", required=True, help="model of the checkpoint: name or name.tag")

    fit = _command(commands, "fit", _fit, "make a reference bank with a threshold from normal images")
    fit.add_argument("--references", required=True, metavar="DIR", help="folder of normal images")
    fit.add_argument("--bank", required=True, metavar="FILE", help="file to write, such as part.safetensors")
    fit.add_argument("--normals", metavar="DIR", help="more normal images, for the threshold only")
    fit.add_argument("--coreset", type=float, metavar="FRACTION", help="fraction of the patches to keep, in (0, 1]")
    fit.add_argument(
        "--rotations",
        type=int,
        default=1,
        metavar="N",
        help="also match with the references rotated N ways, for parts in any orientation",
    )
    _add_model_options(fit)
    _add_image_options(fit)

    score = _command(commands, "score", _score, "score images against references, with heat maps")
    source = score.add_mutually_exclusive_group(required=True)
    source.add_argument("--references", metavar="DIR", help="folder of normal images")
    source.add_argument("--bank", metavar="FILE", help="bank made by fit, or file made by export")
    score.add_argument("--output", required=True, metavar="DIR", help="folder for scores, heat maps and summary")
    score.add_argument("--product", help="product whose references to use, if there are several")
    score.add_argument("--threshold", type=_threshold, help="score above which an image counts as anomalous")
    score.add_argument(
        "--runtime",
        choices=("torch", "onnx", "openvino"),
        help="inference engine (default: onnx for a .onnx file, else torch)",
    )
    score.add_argument("--dtype", choices=("float32", "bfloat16"), help="precision of openvino (default: float32)")
    score.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="images per batch (%(default)s)")
    score.add_argument(
        "--workers", type=_positive, default=1, metavar="N", help="images to read in parallel (%(default)s)"
    )
    score.add_argument("--resume", action="store_true", help="continue an interrupted run with the same options")
    score.add_argument(
        "--engine",
        choices=("ray",),
        help="score on a whole Ray cluster, on its GPUs with --device cuda",
    )
    score.add_argument(
        "--manifest", metavar="FILE", help="list of images: one per line, or a .csv with the column image"
    )
    score.add_argument(
        "images", nargs="*", metavar="IMAGES", help="image files or folders; - reads names from standard input"
    )
    _add_model_options(score)
    _add_image_options(score)

    export = _command(commands, "export", _export, "write a model with its references to an ONNX file")
    export.add_argument("--bank", required=True, metavar="FILE", help="bank made by fit")
    export.add_argument("--output", required=True, metavar="FILE", help="file to write, ending in .onnx")
    export.add_argument("--product", help="product whose references to export, if the bank holds several")
    export.add_argument(
        "--uint8", action="store_true", help="accept resized 8-bit photos, and normalize them inside the model"
    )
    export.add_argument("--features", action="store_true", help="also output the features of each level")
    export.add_argument("--batch-size", type=_positive, metavar="N", help="fixed batch size (default: any)")
    export.add_argument("--threshold", type=_threshold, help="score above which an image counts as anomalous")
    _add_weights_options(export)
    export.set_defaults(device="cpu", bit_depth=None, max_pixels=None, tile=None, keep_aspect=False, roi=None)

    demo = _command(commands, "demo", _demo, "score the sample images of the package")
    demo.add_argument("--output", default="adfeatures-demo", metavar="DIR", help="folder for the results (%(default)s)")
    return parser


def _command(commands: Any, name: str, run: Any, help: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=help, description=help[0].upper() + help[1:] + "."
    )
    command.set_defaults(run=run)
    command.add_argument("--json", action="store_true", help="print the results as JSON")
    return command


def _add_model_options(command: argparse.ArgumentParser) -> None:
    _add_weights_options(command)
    command.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one, else cpu)")


def _add_weights_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", help=f"model to use (default: that of the bank, else {catalog.DEFAULT_MODEL})")
    command.add_argument(
        "--backbone", metavar="NAME", help="backbone of residual_timm: any ViT or pyramid CNN of timm; NAME@3,6: levels"
    )
    command.add_argument("--weights", help="trained weights: a tag, a path, hf-hub:owner/repo or local-dir:/path")
    command.add_argument("--backbone-weights", help="weights of the backbone, in the same forms")


def _add_image_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--product-folders", action="store_true", help="treat each sub-folder of the references as one product"
    )
    command.add_argument("--recursive", action="store_true", help="include images in sub-folders")
    command.add_argument(
        "--tile",
        type=_tiles,
        metavar="SIZE[:OVERLAP]",
        help="cut photos into square tiles of SIZE pixels that overlap by OVERLAP (default: an eighth); auto: the "
        "shorter side of the references, at most 4 times the model's input",
    )
    command.add_argument(
        "--keep-aspect", action="store_true", help="pad photos or small tiles to a square instead of squashing them"
    )
    command.add_argument(
        "--roi",
        metavar="FILE",
        help="mask of the same size as the photos, white where defects matter; or a folder with PRODUCT.png masks",
    )
    command.add_argument(
        "--quantile",
        type=float,
        metavar="FRACTION",
        help="fraction of normal images that should score below the threshold (default: 0.95 for "
        "residual_lite.in1k_v2 and residual_timm, else 0.99)",
    )
    command.add_argument(
        "--bit-depth",
        type=int,
        choices=range(9, 17),
        metavar="BITS",
        help="bits in use in 16-bit images, such as 12 (default: that of the bank, else 16)",
    )
    command.add_argument(
        "--max-pixels",
        type=_positive,
        metavar="N",
        help="pixels to hold in memory at a time, about 20 bytes each; larger images are refused (default: 89000000)",
    )


def _threshold(text: str) -> float:
    with suppress(ValueError):
        if 0 <= (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"{text} is not a score: give a number of 0 or more")


def _tiles(text: str) -> Any:
    from .geometry import AUTO, Geometry

    size, *overlap = text.split(":", 1)
    try:
        return Geometry(tile=AUTO if text == AUTO else int(size), overlap=int(overlap[0]) if overlap else None)
    except ValueError as error:
        reason = f" ({error})" if isinstance(error, InputError) else ""
        raise argparse.ArgumentTypeError(f"{text} is not SIZE, SIZE:OVERLAP or auto{reason}") from error


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of 1 or more")
    return int(text)


def _list(options: argparse.Namespace) -> int:
    names = catalog.list_models(options.filter, options.pretrained)
    if not names:
        print(f"adfeatures: no model matches {options.filter!r}; try '*{options.filter}*'", file=sys.stderr)
    if names or options.json:
        print(dumps(names) if options.json else "\n".join(names))
    return DONE


def _info(options: argparse.Namespace) -> int:
    if options.model is None and options.backbone is None:
        _print(_versions(), options.json)
        return DONE
    name, backbone = options.model, None
    if options.backbone is not None:
        name = catalog.with_backbone(name, options.backbone)
    arch, tag = catalog.find_model(name)
    if tag and catalog.MODELS[arch].any_backbone:
        from .resolve import chosen_backbone

        tag, found = chosen_backbone(tag)
        name, backbone = f"{arch}.{tag}", found.entry
    _print(catalog.describe(name, backbone), options.json)
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


def _download(options: argparse.Namespace) -> int:
    from .checkpoints import sha256
    from .resolve import published_files

    files, missing = published_files(options.model, options.cache_dir)
    if missing:
        print(f"adfeatures: {missing}", file=sys.stderr)
    _print({str(path): sha256(path) for path in files}, options.json)
    return DONE


def _convert(options: argparse.Namespace) -> int:
    from .locks import only_run_for
    from .resolve import convert_checkpoint

    with only_run_for(options.destination):
        checkpoint = convert_checkpoint(options.source, options.destination, options.model)
    _print(
        {
            "file": options.destination,
            "tensors": len(checkpoint.state_dict),
            **checkpoint.metadata,
            **checkpoint.metrics,
        },
        options.json,
    )
    return DONE


def _fit(options: argparse.Namespace) -> int:
    from .bank_files import check_destination
    from .locks import only_run_for

    check_destination(options.bank)
    with only_run_for(options.bank):
        facts = _fit_bank(options)
    _print({"bank": options.bank, **facts}, options.json)
    return DONE


def _fit_bank(options: argparse.Namespace) -> dict[str, Any]:
    from .detectors import model_of, reading_of, set_references
    from .sources import list_images
    from .thresholds import expectation

    model = model_of(options, options.model)
    further = reading_of(options) | {"coreset": options.coreset, "rotations": options.rotations}
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
            "threshold": bank.threshold,
            "quantile": bank.quantile,
            "normal_scores": len(bank.record.normal_scores),
            "expect": expectation(bank.quantile, len(bank.record.normal_scores)) if bank.quantile else None,
        }
        for product, bank in model.references.items()
    }
    return {"model": model.name, "products": facts}


def _score(options: argparse.Namespace) -> int:
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


def _export(options: argparse.Namespace) -> int:
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
    _print({"file": options.output, **{name: facts[name] for name in shown}}, options.json)
    return DONE


def _demo(options: argparse.Namespace) -> int:
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
        print(f"results: {options.output} (scores.csv, overlays/, worst.png, summary.json)")
    for error in summary["errors"]:
        print(f"adfeatures: not scored: {error}", file=sys.stderr)
    return NOTHING_DONE if not summary["scored"] else SOME_FAILED if summary["failed"] else DONE


def _print(facts: dict[str, Any], as_json: bool) -> None:
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
