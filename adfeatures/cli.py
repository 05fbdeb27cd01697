"""The ``adfeatures`` command: its arguments and exit codes."""

from __future__ import annotations

import argparse
import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from . import __version__, catalog, commands
from .console import INTERRUPTED, NOTHING_DONE, console
from .errors import AdfeaturesError, InputError

# The options that references are set with, for a command that takes a bank alone.
_AS_THE_BANK = {"tile": None, "keep_aspect": False, "roi": None, "rotations": None}


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
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    listing = _command(subparsers, "list", commands.list_models)
    listing.add_argument("filter", nargs="?", default="*", help='pattern such as "*dinov2*"')
    listing.add_argument("--pretrained", action="store_true", help="list every set of weights, as name.tag")

    info = _command(subparsers, "info", commands.show_model)
    info.add_argument("model", nargs="?", help="default: show the installed versions, for bug reports")
    info.add_argument("--backbone", metavar="NAME", help="backbone of residual_timm")

    download = _command(subparsers, "download", commands.download)
    download.add_argument("model", help="name or name.tag")
    download.add_argument("--cache-dir", metavar="DIR", help="where to keep them (default: that of huggingface_hub)")

    convert = _command(subparsers, "convert", commands.convert)
    convert.add_argument("source", help="such as checkpoints_pro_norm.pth")
    convert.add_argument("destination", help="file ending in .safetensors")
    convert.add_argument("--model", required=True, help="model of the checkpoint: name or name.tag")

    fit = _command(subparsers, "fit", commands.fit)
    fit.add_argument("--references", required=True, metavar="DIR", help="folder of normal images")
    fit.add_argument("--bank", required=True, metavar="FILE", help="file to write, such as part.safetensors")
    fit.add_argument("--normals", metavar="DIR", help="more normal images, for the threshold only")
    fit.add_argument("--coreset", type=float, metavar="FRACTION", help="fraction of the patches to keep, in (0, 1]")
    _add_model_options(fit)
    _add_image_options(fit)

    score = _command(subparsers, "score", commands.score)
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
        "--workers",
        type=_positive,
        default=1,
        metavar="N",
        help="images to read, and pictures to draw, at a time (%(default)s)",
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

    export = _command(subparsers, "export", commands.export)
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
    export.set_defaults(device="cpu", bit_depth=None, max_pixels=None, **_AS_THE_BANK)

    demo = _command(subparsers, "demo", commands.demo)
    demo.add_argument("--output", default="adfeatures-demo", metavar="DIR", help="folder for the results (%(default)s)")
    return parser


def _command(subparsers: Any, name: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    about = inspect.cleandoc(run.__doc__ or name)
    command: argparse.ArgumentParser = subparsers.add_parser(
        name, help=about[0].lower() + about[1:].rstrip("."), description=about
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
        "--rotations",
        type=int,
        metavar="N",
        help="also match with the references rotated N ways, for parts in any orientation (default: 8 for the "
        "default model if that brings references much closer to each other, else 1)",
    )
    command.add_argument(
        "--quantile",
        type=_quantile,
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


def _quantile(text: str) -> float:
    with suppress(ValueError):
        if 0 < (value := float(text)) <= 1:
            return value
    raise argparse.ArgumentTypeError(f"{text} is not a fraction: give a number between 0 and 1, such as 0.99")


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
