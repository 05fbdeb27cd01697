"""What training/README.md shows is run in miniature: its commands in order, on data made here, then its Python."""

from __future__ import annotations

import importlib.util
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import timm
from helpers.hub_server import HubServer
from helpers.models import write_photos
from helpers.trees import write_manifest, write_mvtec
from torch.distributed.run import get_args_parser

import adfeatures

README = (Path(__file__).parents[1] / "training" / "README.md").read_text(encoding="utf-8")
MVTEC = "bottle cable capsule carpet grid hazelnut leather metal_nut pill screw tile toothbrush transistor wood zipper"
# What each entry is given before the documented options, which win over these.
SMALL = {
    "training.centers": "--img-size 64 --held-out 0.3 --workers 0 --device cpu",
    "training.pretrain": "--img-size 64 --num-heads 4 --num-keys 8 --batch-size 8 --epochs 1 --held-out 0.3 --workers 0"
    " --precision float32 --device cpu --backbone efficientnet_lite",
    "training.evaluate": "--img-size 64 --products bottle --shots 2 --epochs 1 --workers 0 --device cpu",
}
SMALL_WORDS = {"dinov2_base": "efficientnet_lite", "adpretrain_dinov2_base": "residual_lite"}
# Not run: runs of several devices, the tutorial, the reproduction, the judgment and the training of the head, which
# have tests of their own, and the trial of precisions, which is too long.
READ = (
    *("torchrun", "--help", "runs/precision"),
    *("training.tutorial", "training.reproduce", "training.judge", "training.learn"),
)
SLOW = ("--method all", "--data ")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*cannot pin down"),
    pytest.mark.filterwarnings("ignore:Fewer normal images"),
    pytest.mark.filterwarnings("ignore:GLASS made its textures"),
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(left_out: tuple[str, ...] = (), only: tuple[str, ...] = ("",)) -> list[list[str]]:
    """The documented calls of the training package, as the entry and its arguments."""
    found = []
    lines = "".join(blocks("bash")).replace("\\\n", "").splitlines()
    for line in lines:
        words = shlex.split(line, comments=True)
        if not words or any(word in line for word in left_out) or not any(word in line for word in only):
            continue
        if words[0] == "torchrun":
            launched = get_args_parser().parse_args(words[1:])
            assert launched.module
            found.append([launched.training_script, *launched.training_script_args])
        elif words[:2] == ["python", "-m"]:
            found.append(words[2:])
        else:
            assert words[:2] in (["pip", "install"], ["hf", "auth"]), f"nothing here runs {line!r}"
    return found


def run(entry: str, *arguments: str) -> int:
    code: int = importlib.import_module(entry).main(arguments)
    return code


@cache
def options(entry: str) -> frozenset[str]:
    """The options that an entry says it has."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        printed: list[str] = []
        patch.setattr("sys.stdout.write", printed.append)
        run(entry, "--help")
    assert not left.value.code
    return frozenset(re.findall(r"(?<![\w-])--[a-z][\w-]*", "".join(printed)))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the data that the README speaks of."""
    monkeypatch.chdir(tmp_path)
    made = "--output data/Real-IAD --products linen --images-per-product 10 15 --size 64"
    assert run("training.synthesize", *made.split()) == 0
    write_mvtec(Path("data/mvtec"), MVTEC.split(), good=4, test_good=2, bad=2)
    write_mvtec(Path("my_products"), ("bottle",), good=10, test_good=2, bad=2, seed=2000)
    write_mvtec(Path("parts"), ("nut", "bolt"), good=5, test_good=3, bad=4, seed=4000)
    write_manifest(Path("parts"))
    write_photos(Path("good"), range(3))
    return tmp_path


def run_small(entry: str, *arguments: str) -> None:
    words = [SMALL_WORDS.get(word, word) for word in arguments if word != "..."]
    small = "" if "--check" in words else SMALL.get(entry, "")
    assert run(entry, *small.split(), *words) == 0, (entry, words)


def test_every_option_exists() -> None:
    for entry, *arguments in commands():
        wanted = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        assert wanted <= options(entry), (entry, wanted - options(entry))
    entries = {entry for entry, *_ in commands()} | set(re.findall(r"`(training\.(?!bench)[a-z]+)`", README))
    known = {option for entry in entries for option in options(entry)}
    mentioned = set(re.findall(r"`(--[a-z][\w-]*)", README))
    assert len(mentioned) > 20 and mentioned <= known, mentioned - known


def test_every_module_exists() -> None:
    for name in sorted(set(re.findall(r"training(?:\.[a-z_]+)+(?=[`\s])", README))):
        assert importlib.util.find_spec(name), name


def test_commands_lead_from_images_to_a_published_model(
    workplace: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_owner")
    hub.allow("hf_of_the_owner", "owner")
    documented = commands(left_out=READ + SLOW)
    assert {entry for entry, *_ in documented} == {
        f"training.{name}" for name in ("centers", "pretrain", "evaluate", "publish")
    }
    for command in documented:
        run_small(*command)
    published = "runs/dinov2_base/checkpoints_pro_norm.safetensors"
    assert run("training.publish", published, "--folder", str(workplace / "folder")) == 0
    adfeatures.register_with_timm()
    for block in blocks("python"):
        code = block.replace("/path/to/folder", str(workplace / "folder"))
        namespace = {"adfeatures": adfeatures, "timm": timm}
        exec(compile(code, "training/README.md", "exec"), namespace)
        model = namespace["model"]
        assert isinstance(model, adfeatures.FeatureExtractor) and model.img_size == (64, 64)


@pytest.mark.slow
def test_commands_that_take_longer(workplace: Path) -> None:
    documented = commands(left_out=READ, only=SLOW)
    assert len(documented) == 3
    for number, (entry, *arguments) in enumerate(documented):
        run_small(entry, "--output", f"runs/{number}", *arguments)
