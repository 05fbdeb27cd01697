"""The procedural data set: layout, masks, determinism, resuming, refusals; its geometry against brute force."""

from __future__ import annotations

import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from adfeatures.errors import InputError, UnknownNameError
from training.data import real_iad
from training.data.synthetic import DEFECTS, PRODUCTS, VIEWS, render, synthesize
from training.data.synthetic.camera import View, project
from training.data.synthetic.canvas import Part, box, disc, noise, pebbles, segment
from training.synthesize import main

ROOT = Path(__file__).parents[2]
PATH = re.compile(
    r"realiad_512/(?P<product>[a-z0-9_]+?)/(?:OK|NG/(?P<defect>[A-Z]{2}))/S(?P<folder>\d{4})/"
    r"(?P=product)(?P<gap>_{1,2})(?P<number>\d{4})_(?:OK|NG_(?P<code>[A-Z]{2}))_C(?P<view>[1-5])_(?P<time>\d{14})\.(?:jpg|png)"
)
SMALL: dict[str, Any] = {"products": 3, "good": 2, "bad": 8, "size": 48, "seed": 3}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("synthetic") / "set"
    assert synthesize(output, **SMALL) == 3 * 10 * VIEWS
    return output


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def images(folder: Path) -> list[str]:
    return sorted(name for name in contents(folder) if name.startswith("realiad_512"))


def run_entry(*arguments: str, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "training.synthesize", *arguments]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)  # type: ignore[call-overload]


# --- what it offers


def test_enough_products_and_defects() -> None:
    assert len(PRODUCTS) == len(set(PRODUCTS)) >= 30
    assert set(DEFECTS) == {"AK", "BX", "CH", "HS", "PS", "QS", "YW", "ZW"}
    # The reader takes a folder with one of the thirty for Real-IAD itself, and looks for the view anywhere in a name.
    assert not set(PRODUCTS) & set(real_iad.PRODUCTS)
    assert not any(re.search(r"C[1-5]|[^a-z0-9_]", name) for name in PRODUCTS)


@pytest.mark.parametrize("product", PRODUCTS)
def test_every_defect_is_seen_from_above_and_the_mask_is_exact(product: str) -> None:
    sound, nothing = render(product, 4, size=48)
    assert nothing is None and sound.size == (48, 48) and sound.mode == "RGB"
    for defect in DEFECTS:
        flawed, mask = render(product, 4, defect, size=48)
        assert mask is not None and mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 255}, defect
        difference = np.abs(np.asarray(flawed, int) - np.asarray(sound, int)).max(2)
        assert not difference[~ndimage.binary_dilation(mask > 0, np.ones((5, 5)))].any(), defect
        assert (difference[mask > 0] > 0).mean() > 0.5, defect
        assert (difference[mask == 0] > 14).sum() <= 0.1 * (mask > 0).sum(), defect
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        assert min(ndimage.maximum(difference, labels, range(1, count + 1))) >= 4, defect


@pytest.mark.parametrize("product", ["gear", "keyboard", "linen"])
def test_masks_are_exact_in_every_view_and_absent_where_nothing_is_to_be_seen(product: str) -> None:
    seen = Counter[bool]()
    for seed in range(3):
        for view in range(1, VIEWS + 1):
            sound, _ = render(product, seed, view=view, size=64)
            flawed, mask = render(product, seed, "AK", view, size=64)
            difference = np.abs(np.asarray(flawed, int) - np.asarray(sound, int)).max(2)
            if mask is None:
                assert not difference.any()
            else:
                assert not difference[~ndimage.binary_dilation(mask > 0, np.ones((5, 5)))].any()
            seen[mask is not None] += 1
    assert seen[True] >= 6


def test_views_and_parts_differ() -> None:
    pictures = [
        np.asarray(render("hex_nut", seed, view=view, size=64)[0], float) for seed in (0, 1) for view in (1, 2, 3)
    ]
    for index, first in enumerate(pictures):
        for second in pictures[:index]:
            assert np.abs(first - second).mean() > 4


def test_render_is_deterministic() -> None:
    (first, mask), (second, again) = (render("circuit_board", 7, "QS", 2, 64) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert mask is not None and again is not None and (mask == again).all()


def test_render_refuses() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'gear'"):
        render("gaer", 0)
    with pytest.raises(UnknownNameError, match="Unknown defect 'XX'"):
        render("gear", 0, "XX")
    for arguments in ({"view": 6}, {"view": 0}, {"size": 16}, {"seed": -1}):
        with pytest.raises(InputError):
            render(**{"product": "gear", "seed": 0, **arguments})  # type: ignore[arg-type]


# --- the layout


def test_layout(dataset: Path) -> None:
    parts, gaps = defaultdict(list), Counter[tuple[str, str]]()
    wrong = 0
    for name in images(dataset):
        match = PATH.fullmatch(name)
        assert match, name
        assert match["folder"] == match["number"]
        wrong += match["code"] != match["defect"]
        gaps[match["product"], match["gap"]] += 1
        if name.endswith(".png"):
            assert (dataset / name).with_suffix(".jpg").exists()
        else:
            parts[match["product"], match["defect"], match["folder"]].append(match["view"])
    assert len(parts) == 3 * 10
    assert all(sorted(views) == list("12345") for views in parts.values())
    # Numbers belong to one part of a product, whatever tree it is in.
    assert len({(product, folder) for product, _, folder in parts}) == len(parts)
    kinds = Counter((product, defect) for product, defect, _ in parts)
    assert kinds == {
        (product, defect): 2 if defect is None else 1 for product in PRODUCTS[:3] for defect in (None, *DEFECTS)
    }
    # One product mixes single and double underscores.
    both = {product for product, gap in gaps if gap == "__"}
    assert len(both) == 1 and all(gaps[product, "_"] for product in both)
    assert wrong == 0


def test_some_scratches_carry_another_code(tmp_path: Path) -> None:
    synthesize(tmp_path / "set", products=PRODUCTS[2:3], good=0, bad=12, size=32)
    codes = {
        match["code"]
        for name in images(tmp_path / "set")
        if (match := PATH.fullmatch(name)) and match["defect"] == "HS"
    }
    assert codes == {"HS", "QS"}


def test_masks_lie_beside_their_images(dataset: Path) -> None:
    masks = [dataset / name for name in images(dataset) if name.endswith(".png")]
    ng = [name for name in images(dataset) if name.endswith(".jpg") and "/NG/" in name]
    assert masks and not any("/OK/" in mask.as_posix() for mask in masks)
    # Some views do not show the defect; the one from above always does.
    assert 0.5 < len(masks) / len(ng) < 1
    assert sum("_C1_" in mask.name for mask in masks) == 3 * 8
    for path in masks:
        with Image.open(path) as mask, Image.open(path.with_suffix(".jpg")) as image:
            assert mask.size == image.size == (48, 48) and mask.mode == "L" and image.mode == "RGB"
            assert set(np.unique(np.asarray(mask))) == {0, 255}


def test_the_reader_of_real_iad_reads_it(dataset: Path) -> None:
    items = real_iad.read(dataset)
    files = images(dataset)
    assert {item.image for item in items} == {str(dataset / name) for name in files if name.endswith(".jpg")}
    assert {item.mask for item in items} - {None} == {str(dataset / name) for name in files if name.endswith(".png")}


def test_a_sheet_and_a_note_come_with_it(dataset: Path) -> None:
    with Image.open(dataset / "contact_sheet.jpg") as sheet:
        assert sheet.width > sheet.height > 2 * 144
        assert np.asarray(sheet.convert("L"), float).std() > 20
    note = (dataset / "README.txt").read_text()
    assert (
        "MIT" in note
        and "training/synthesize.py" in note
        and "seed 3" in note
        and all(code in note for code in DEFECTS)
    )


# --- determinism and resuming


def test_the_same_bytes_with_more_workers(dataset: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "set", **SMALL, workers=2)
    assert contents(tmp_path / "set") == contents(dataset)


def test_another_seed_gives_other_images(dataset: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "set", **{**SMALL, "seed": 4, "products": ("linen",)})
    before, after = contents(dataset), contents(tmp_path / "set")
    same = [name for name in images(tmp_path / "set") if name.endswith(".jpg") and before[name] == after[name]]
    assert not same


def test_what_is_missing_is_made_again_and_the_rest_kept(dataset: Path, tmp_path: Path) -> None:
    synthesize(tmp_path, **SMALL)
    before = contents(tmp_path)
    for view in ("_C1_", "_C4_"):
        (victim,) = tmp_path.glob(f"realiad_512/linen/NG/HS/S*/*{view}*.jpg")
        victim.unlink()
    leftover = victim.with_name(".linen_0004_NG.01234567.jpg")
    leftover.write_bytes(b"half an image")
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jpg")}
    assert synthesize(tmp_path, **SMALL) == 2
    assert contents(tmp_path) == before
    changed = [path.name for path in times if path.exists() and path.stat().st_mtime_ns != times[path]]
    assert changed == ["contact_sheet.jpg"]
    assert synthesize(tmp_path, **SMALL) == 0


def test_a_killed_run_goes_on(dataset: Path, tmp_path: Path) -> None:
    output = tmp_path / "set"
    arguments = (
        "--output",
        str(output),
        "--products",
        "3",
        "--images-per-product",
        "10",
        "40",
        "--size",
        "48",
        "--seed",
        "3",
    )
    process = run_entry(*arguments)
    deadline = time.monotonic() + 60
    while len(list(output.glob("realiad_512/*/*/*/*/*.jpg"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 0 < synthesize(output, **SMALL) < 150
    assert contents(output) == contents(dataset)


@pytest.mark.parametrize("change", [{"seed": 5}, {"good": 3}, {"size": 64}, {"products": ("linen",)}])
def test_a_folder_of_other_settings_is_refused(dataset: Path, change: dict[str, object]) -> None:
    before = contents(dataset)
    with pytest.raises(InputError, match=f"other settings .*{next(iter(change))}"):
        synthesize(dataset, **{**SMALL, **change})
    assert contents(dataset) == before


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(InputError, match="not empty"):
        synthesize(tmp_path, **SMALL)
    (tmp_path / "synthetic.json").write_text("{broken")
    with pytest.raises(InputError, match="synthetic.json cannot be read"):
        synthesize(tmp_path, **SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photo.jpg", "synthetic.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"good": 0, "bad": 0},
        {"good": -1},
        {"workers": 0},
        {"seed": -1},
        {"size": 8},
        {"products": 0},
        {"products": 999},
        {"products": ()},
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(InputError):
        synthesize(tmp_path / "set", **{**SMALL, **change})
    assert not (tmp_path / "set").exists()


# --- the entry point


def test_entry(tmp_path: Path, capsys: pytest.CaptureFixture[str], threads: None) -> None:
    arguments = [
        "--output",
        str(tmp_path / "set"),
        "--products",
        "gear",
        "label",
        "--images-per-product",
        "5",
        "10",
        "--size",
        "48",
    ]
    assert main(arguments) == 0
    assert re.search(r"wrote 30 images in [\d.]+ s, [\d.]+ images/s per worker", capsys.readouterr().out)
    assert {path.name for path in (tmp_path / "set/realiad_512").iterdir()} == {"gear", "label"}
    assert main(arguments) == 0
    assert "wrote 0 images; everything was there" in capsys.readouterr().out


def test_entry_explains_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str], threads: None) -> None:
    (tmp_path / "file").write_text("in the way")
    for arguments, message in (
        (["--output", str(tmp_path / "a"), "--products", "geer"], "Did you mean 'gear'"),
        (["--output", str(tmp_path / "a"), "--images-per-product", "7", "5"], "multiples of 5"),
        (["--output", str(tmp_path / "file" / "a"), "--products", "1"], "cannot be used"),
        (["--output", "/proc/nowhere/a", "--products", "1"], "Cannot write"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error and error.count("training.synthesize: error:") == 1


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_full_disk_stops_it_and_loses_nothing(tmp_path: Path, workers: str) -> None:
    arguments = (
        "--output",
        str(tmp_path),
        "--products",
        "linen",
        "--images-per-product",
        "5",
        "10",
        "--size",
        "96",
        "--workers",
        workers,
    )
    # Files larger than this cannot be written, as on a disk with that much left.
    process = run_entry(*arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)))
    output, error = process.communicate(timeout=120)
    assert process.returncode == 2, error
    assert "Cannot write" in error and "Free some space" in error and "Traceback" not in error
    assert not [path for path in tmp_path.rglob(".*") if path.suffix in (".jpg", ".png")]
    assert synthesize(tmp_path, products=("linen",), good=1, bad=2, size=96) == 15


@pytest.mark.slow
def test_a_killed_worker_is_reported(tmp_path: Path) -> None:
    process = run_entry("--output", str(tmp_path / "set"), "--workers", "2")
    workers: list[int] = []
    deadline = time.monotonic() + 60
    while not (workers and any(tmp_path.glob("set/realiad_512/*/*/*/*/*.jpg"))) and time.monotonic() < deadline:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [int(child) for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
        time.sleep(0.05)
    os.kill(workers[0], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and "A worker was killed" in error and "Traceback" not in error


# --- geometry, against brute force


def test_projection_finds_the_nearest_point_on_each_line_of_sight() -> None:
    rng = np.random.default_rng(0)
    part = Part.blank(64)
    part.height[...] = 0.15 * np.clip(noise(rng, part.shape, 5), 0, 2)
    part.height[20:30, 30:44] += 0.3
    view = replace(View.of(2, rng, part), yaw=0.4)
    size, dense = 24, 6000
    x, y = project(part.height, view, size)
    sin, cos, window = math.sin(view.tilt), math.cos(view.tilt), view.window
    aim = 0.4 * view.tall * sin
    far = np.linspace(-2, 2, dense)
    wrong = 0
    for column in range(size):
        across = ((column + 0.5) / size * 2 - 1) * window
        depth = far * (1 + 0.08 * sin * far)
        spread = across * (1 + 0.16 * sin * far)
        canvas_x = view.center[0] + math.cos(view.yaw) * spread - math.sin(view.yaw) * depth
        canvas_y = view.center[1] - math.sin(view.yaw) * spread - math.cos(view.yaw) * depth
        pixels = [(canvas_y + 1) * 32 - 0.5, (canvas_x + 1) * 32 - 0.5]
        height = ndimage.map_coordinates(part.height, pixels, order=1, mode="reflect")
        risen = depth * cos + height * sin
        for row in range(size):
            sight = aim + (1 - (row + 0.5) / size * 2) * window
            start = int(np.argmax(far >= -1.6))
            hit = start + int(np.argmax(risen[start:] >= sight))
            # A step of the projection is 2 * window / size along the table.
            wrong += (
                math.hypot(x[row, column] - canvas_x[hit], y[row, column] - canvas_y[hit]) > 1.5 * 2 * window / size
            )
    assert wrong / size**2 < 0.03


def test_shapes_have_the_distances_of_their_outlines() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.uniform(-1, 1, (2, 1, 400)).astype(np.float32)
    t = np.linspace(0, 1, 4001)
    side_x, side_y = np.concatenate([0.5 * (2 * t - 1)] * 2), np.repeat((0.3, -0.3), t.size)
    top_x, top_y = np.repeat((0.5, -0.5), t.size), np.concatenate([0.3 * (2 * t - 1)] * 2)
    outline = np.stack([np.concatenate([side_x, top_x]), np.concatenate([side_y, top_y])])
    nearest = np.hypot(x.T - outline[0], y.T - outline[1]).min(1)
    inside = (np.abs(x) < 0.5) & (np.abs(y) < 0.3)
    np.testing.assert_allclose(box(x, y, 0.5, 0.3)[0], np.where(inside[0], -nearest, nearest), atol=1e-3)
    line = np.stack([-0.4 + 0.9 * t, 0.2 - 0.5 * t])
    np.testing.assert_allclose(
        segment(x, y, (-0.4, 0.2), (0.5, -0.3))[0], np.hypot(x.T - line[0], y.T - line[1]).min(1), atol=1e-3
    )


def test_pebbles_of_a_regular_grid_are_where_they_should_be() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.uniform(0, 1, (2, 20, 20)).astype(np.float32)
    near, far, cell, total = pebbles(rng, x, y, 4, irregular=0)
    u, v = (x - x.min()) * 4 % 1 - 0.5, (y - y.min()) * 4 % 1 - 0.5
    np.testing.assert_allclose(near, np.hypot(u, v), atol=1e-4)
    np.testing.assert_allclose(far, np.hypot(1 - np.maximum(abs(u), abs(v)), np.minimum(abs(u), abs(v))), atol=1e-4)
    assert cell.min() >= 0 and cell.max() < total


def test_a_window_draws_where_it_should() -> None:
    part = Part.blank(200)
    outer = part.near(0.3, -0.2, 0.5, 0.7)
    inner = outer.near(0.2, 0.1, 0.2, -0.3)
    inner.paint(inner.inside(disc(inner.x, inner.y, 0.05)), (1, 1, 1))
    row, column = ndimage.center_of_mass(part.color[0])
    expected_x = 0.3 + 0.2 * math.cos(0.7) - 0.1 * math.sin(0.7)
    expected_y = -0.2 + 0.2 * math.sin(0.7) + 0.1 * math.cos(0.7)
    assert (column + 0.5) / 100 - 1 == pytest.approx(expected_x, abs=1e-3)
    assert (row + 0.5) / 100 - 1 == pytest.approx(expected_y, abs=1e-3)
    assert part.color[0].sum() * part.texel**2 == pytest.approx(math.pi * 0.05**2, rel=0.02)


def test_a_missing_piece_leaves_the_random_numbers_after_it_alone() -> None:
    def draw(missing: int | None) -> Part:
        rng, part = np.random.default_rng(3), Part.blank(64, missing)
        for x in (-0.5, 0.0, 0.5):
            with part.piece():
                window = part.near(x, float(rng.uniform(-0.3, 0.3)), 0.2)
                window.solid(disc(window.x, window.y, 0.15), 0.1, (0.5, 0.5, 0.5))
        return part

    whole, without = draw(None), draw(1)
    assert whole.pieces.count == 3
    changed = (whole.maps != without.maps).any((0, 1))
    columns = np.flatnonzero(changed)
    assert columns.size and columns.min() > 20 and columns.max() < 44
    assert not without.maps[:, :, 24:40].any()


def test_noise_has_unit_spread() -> None:
    values = noise(np.random.default_rng(4), (400, 400), 40)
    assert abs(float(values.mean())) < 0.1 and float(values.std()) == pytest.approx(1, abs=0.15)


def test_nothing_else_is_written(dataset: Path) -> None:
    assert {os.fspath(path.relative_to(dataset)) for path in dataset.iterdir()} == {
        "README.txt",
        "contact_sheet.jpg",
        "realiad_512",
        "synthetic.json",
    }
