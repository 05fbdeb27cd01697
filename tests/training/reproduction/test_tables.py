"""The paper's tables from stored results, without any model, and the published numbers that stand beside them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from training import reproduce
from training.data import DATASETS
from training.evaluation.results import write_json
from training.reproduction.plan import BACKBONES
from training.reproduction.tables import NUMBERS, TABLES, published_numbers

# Of the paper, I-AUROC and PRO, typed here once more: ImageBind on VisA.
VISA = {
    ("ImageBind", "PaDiM", "raw"): ("92.6", "86.3"),
    ("ImageBind", "PatchCore", "raw"): ("91.6", "81.3"),
    ("ImageBind", "FeatureNorm", "raw"): ("49.2", "44.5"),
    ("ImageBind", "PaDiM", "pretrained"): ("95.4", "88.7"),
    ("ImageBind", "PatchCore", "pretrained"): ("94.6", "87.0"),
    ("ImageBind", "FeatureNorm", "pretrained"): ("94.2", "89.0"),
    ("Ablations", "both losses", "PaDiM"): ("95.4", "88.7"),
    ("Ablations", "both losses", "PatchCore"): ("94.6", "87.0"),
    ("Ablations", "both losses", "FeatureNorm"): ("94.2", "89.0"),
    ("Ablations", "without residuals", "PaDiM"): ("93.5", "86.1"),
    ("Ablations", "without residuals", "PatchCore"): ("93.6", "85.1"),
    ("Ablations", "without residuals", "FeatureNorm"): ("82.9", "83.9"),
    ("Ablations", "angle loss alone", "PaDiM"): ("93.9", "85.2"),
    ("Ablations", "angle loss alone", "PatchCore"): ("93.2", "83.8"),
    ("Ablations", "angle loss alone", "FeatureNorm"): ("83.9", "83.0"),
    ("Ablations", "norm loss alone", "PaDiM"): ("93.7", "85.3"),
    ("Ablations", "norm loss alone", "PatchCore"): ("90.9", "84.5"),
    ("Ablations", "norm loss alone", "FeatureNorm"): ("92.4", "85.1"),
    ("Ablations", "trainable backbone", "PatchCore"): ("78.4", "32.1"),
}
GAINS = {
    ("DINOv2", "DINOv2-base, PatchCore", "MVTec AD"): ("3.5", "4.7"),
    ("DINOv2", "DINOv2-base, UniAD", "MVTec AD"): ("26.0", "9.7"),
    ("CLIP", "CLIP-base, PatchCore", "MPDD"): ("10.1", "28.7"),
    ("DINOv2", "DINOv2-large, PaDiM", "MPDD"): ("6.8", "3.3"),
}


def line(method: str, features: str, auroc: float, pro: float | None, **more: object) -> dict:
    values = {"image_auroc": auroc, "aupro": 0.123, "aupro_original": pro}
    given = {"method": method, "product": "mean", "features": features, "products": 12, "view": "", "trained_on": ""}
    return {**given, "values": values, **more}


def store(output: Path, place: str, *lines: dict) -> None:
    """What an evaluation leaves there, as far as the tables read it."""
    settings = {"references": None, "shots": 8, "protocol": "original", "epochs": None}
    write_json(output / place / "results.json", {"settings": settings, "table": list(lines)})


def rows(output: Path) -> dict[tuple[str, str, str, str], dict[str, str]]:
    with open(output / "tables.csv", newline="") as file:
        return {(r["table"], r["row"], r["column"], r["weights"]): r for r in csv.DictReader(file)}


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose tables are written where no network can be built."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model is built")

    for name in ("adfeatures.factory.build_backbone", "adfeatures.projector.ResidualProjector.__init__"):
        monkeypatch.setattr(name, refuse)
    return tmp_path


def write(output: Path) -> None:
    assert reproduce.main(["--tables", "--output", str(output)]) == 0


def test_the_published_numbers_are_those_of_the_paper() -> None:
    published = published_numbers()
    keys = {(table, f"ImageBind, {first}, {second}", "VisA"): values for (table, first, second), values in VISA.items()}
    keys |= {(table, f"{row}, difference", data): values for (table, row, data), values in GAINS.items()}
    expected = {
        (table, row, f"{data} {name}"): value
        for (table, row, data), values in keys.items()
        for name, value in zip(("I-AUROC", "PRO"), values, strict=True)
    }
    assert published == expected
    with open(NUMBERS, newline="") as file:
        assert len(list(csv.DictReader(file))) == len(published), "a number stands twice"


def test_rows_and_columns_have_the_words_of_an_evaluation() -> None:
    columns = {f"{tree.title} {metric}" for tree in DATASETS.values() for metric in ("I-AUROC", "PRO")}
    for table, row, column in published_numbers():
        assert table in TABLES and column in columns and row.partition(",")[0] in BACKBONES.values()


def test_own_numbers_stand_beside_the_published_ones(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store(
        tables,
        "published/imagebind_huge/visa/angle",
        line("patchcore", "pretrained", 0.9503, 0.8601),
        line("patchcore", "raw", 0.9203, 0.8205),
        line("patchcore", "difference", 0.03, 0.0396),
        line("patchcore", "pretrained", 0.5, 0.5, product="candle", products=1),
        line("patchcore", "pretrained", 0.5, 0.5, view="C1"),
    )
    write(tables)
    found = rows(tables)
    own = found["ImageBind", "ImageBind, PatchCore, pretrained", "VisA I-AUROC", ""]
    assert float(own["here"]) == pytest.approx(95.03) and own["published"] == "94.6" and own["difference"] == "+0.43"
    pro = found["ImageBind", "ImageBind, PatchCore, raw", "VisA PRO", ""]
    assert float(pro["here"]) == pytest.approx(82.05) and pro["difference"] == "+0.75" and pro["products"] == "12 of 12"
    gain = found["ImageBind", "ImageBind, PatchCore, difference", "VisA I-AUROC", ""]
    assert float(gain["here"]) == pytest.approx(3.0) and gain["published"] == gain["difference"] == ""
    # Published, and not evaluated here.
    assert found["Ablations", "ImageBind, trainable backbone, PatchCore", "VisA PRO", ""]["here"] == ""
    printed = capsys.readouterr().out
    assert "| ImageBind, PatchCore, pretrained | 95.03 (94.6, +0.43) | 86.01 (87.0, -0.99) |" in printed
    assert "| ImageBind, trainable backbone, PatchCore | - (78.4) | - (32.1) |" in printed
    assert "| published/imagebind_huge/visa/angle | the first 8 training images | original | the paper's |" in printed
    assert printed.rstrip() == (tables / "tables.md").read_text().rstrip()
    assert [table for table in TABLES if f"\n## {table}\n" in printed] == list(TABLES)


def test_a_part_of_a_data_set_is_not_compared(tables: Path) -> None:
    store(tables, "published/imagebind_huge/visa/angle", line("padim", "raw", 0.99, 0.9, products=2))
    write(tables)
    found = rows(tables)["ImageBind", "ImageBind, PaDiM, raw", "VisA I-AUROC", ""]
    assert (found["products"], found["published"], found["difference"]) == ("2 of 12", "92.6", "")
    assert "| 99.00 (92.6), 2 of 12 |" in (tables / "tables.md").read_text()


def test_what_the_paper_makes_otherwise_has_a_name_of_its_own(tables: Path) -> None:
    store(
        tables,
        "published/imagebind_huge/visa/norm",
        *(line(method, "pretrained", 0.9, 0.8) for method in ("feature_norm", "cflow", "cflow_oracle", "uniad_oracle")),
        line("feature_norm", "raw", 0.5, 0.4),
        line("my.module:Mine", "pretrained", 0.7, 0.6),
    )
    store(tables, "published/imagebind_huge/visa/norm_listed", line("feature_norm_listed", "pretrained", 0.95, 0.9))
    write(tables)
    found = {row: value for (_, row, column, _), value in rows(tables).items() if column == "VisA I-AUROC"}
    eight, listed = (found[f"ImageBind, FeatureNorm{shots}, pretrained"] for shots in (" (8-shot)", ""))
    assert eight["published"] == "" and (listed["published"], listed["difference"]) == ("94.2", "+0.80")
    assert found["ImageBind, FeatureNorm, raw"]["difference"] == "+0.80"
    for row in ("CFLOW (last epoch)", "CFLOW", "UniAD (oracle)", "Mine"):
        assert found[f"ImageBind, {row}, pretrained"]["here"]


def test_projectors_trained_here_and_ablations(tables: Path) -> None:
    for training, auroc in (("both", 0.95), ("angle", 0.94), ("norm", 0.93), ("no_residual", 0.92)):
        store(
            tables,
            f"{training}/imagebind_huge/visa/norm",
            line("feature_norm", "pretrained", auroc, 0.8),
            line("feature_norm", "raw", 0.5, 0.4),
            line("padim", "pretrained", auroc, None),
            line("uniad", "pretrained", auroc, 0.8),
        )
    store(tables, "published/imagebind_huge/visa/angle", line("padim", "pretrained", 0.96, 0.8))
    write(tables)
    found = rows(tables)
    name = "ImageBind, PaDiM, pretrained"
    assert {weights for _, row, _, weights in found if row == name} == {"", "trained here"}
    assert found["ImageBind", name, "VisA I-AUROC", "trained here"]["difference"] == "-0.40"
    assert ("ImageBind", name, "VisA PRO", "trained here") not in found  # not defined
    for title, expected in (("both losses", "-0.40"), ("angle loss alone", "+0.10"), ("norm loss alone", "-0.70")):
        row = found["Ablations", f"ImageBind, {title}, PaDiM", "VisA I-AUROC", "trained here"]
        assert row["difference"] == expected
    # Without residuals there are no references, neither eight nor listed ones.
    row = found["Ablations", "ImageBind, without residuals, FeatureNorm", "VisA I-AUROC", "trained here"]
    assert row["difference"] == "+9.10"
    assert not any(row_name.endswith("UniAD") for table, row_name, *_ in found if table == "Ablations")


def test_nothing_stored_and_damaged_results(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tables)
    assert all(row["here"] == "" for row in rows(tables).values())
    store(tables, "published/imagebind_huge/visa/angle")
    file = tables / "published/imagebind_huge/visa/angle/results.json"
    file.write_text(file.read_text()[:40])
    assert reproduce.main(["--tables", "--output", str(tables)]) == 2
    assert f"{file} cannot be read" in capsys.readouterr().err
