"""Makes the golden outputs that follow from formulas, in float64 and without the packages that they test.

Run it as ``PYTHONPATH=tests python tests/golden/make_formulas.py FOLDER``. The files in use are those of the original
implementation; ``tests/test_golden.py`` holds these against them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from helpers.golden_values import fill, golden, value
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter
from skimage.measure import label, regionprops
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score
from torch import Tensor

Tensors = dict[str, Tensor]
LEVELS = range(4)


def shapes() -> dict[str, dict[str, list[int]]]:
    """Keys and shapes of the state dicts, from the sizes of the networks."""
    return {
        "projector": projector_shapes(32),
        "backbone_dinov2": dinov2_shapes(64),
        "backbone_clip": clip_shapes(64),
        "backbone_imagebind": imagebind_shapes(64),
    }


def layer(name: str, *shape: int) -> dict[str, list[int]]:
    return {f"{name}.weight": list(shape), f"{name}.bias": [shape[0]]}


def attention(name: str, width: int) -> dict[str, list[int]]:
    packed = {f"{name}.in_proj_weight": [3 * width, width], f"{name}.in_proj_bias": [3 * width]}
    return packed | layer(f"{name}.out_proj", width, width)


def projector_shapes(width: int) -> dict[str, list[int]]:
    # A sixteenth of the hidden width, rounded to a multiple of eight.
    squeezed = max(8, (4 * width // 16 + 4) // 8 * 8)
    found: dict[str, list[int]] = {}
    for level in LEVELS:
        prefix = f"l{level + 1}_proj"
        mlp = f"{prefix}.layers.0.mlp"
        found |= {f"{prefix}.x_ref": [1, 2048, width]} | attention(f"{prefix}.layers.0.cross_attn", width)
        found |= layer(f"{mlp}.fc1", 4 * width, width) | layer(f"{mlp}.fc2", width, 4 * width)
        found |= layer(f"{mlp}.se.fc1", squeezed, 4 * width) | layer(f"{mlp}.se.fc2", 4 * width, squeezed)
        found |= layer(f"{prefix}.ref_proj.project", width, width, 1)
    return found


def dinov2_shapes(width: int) -> dict[str, list[int]]:
    found = {"cls_token": [1, 1, width], "pos_embed": [1, 1 + 37 * 37, width], "mask_token": [1, width]}
    found |= layer("patch_embed.proj", width, 3, 14, 14) | layer("norm", width)
    for number in range(4):
        block = f"blocks.{number}"
        found |= layer(f"{block}.norm1", width) | layer(f"{block}.norm2", width)
        found |= layer(f"{block}.attn.qkv", 3 * width, width) | layer(f"{block}.attn.proj", width, width)
        found |= layer(f"{block}.mlp.fc1", 4 * width, width) | layer(f"{block}.mlp.fc2", width, 4 * width)
        found |= {f"{block}.ls1.gamma": [width], f"{block}.ls2.gamma": [width]}
    return found


def clip_shapes(width: int) -> dict[str, list[int]]:
    found = {"class_embedding": [width], "positional_embedding": [1 + 14 * 14, width], "proj": [width, 32]}
    found |= {"conv1.weight": [width, 3, 16, 16]} | layer("ln_pre", width) | layer("ln_post", width)
    for number in range(12):
        block = f"transformer.resblocks.{number}"
        found |= layer(f"{block}.ln_1", width) | layer(f"{block}.ln_2", width) | attention(f"{block}.attn", width)
        found |= layer(f"{block}.mlp.c_fc", 4 * width, width) | layer(f"{block}.mlp.c_proj", width, 4 * width)
    return found


def imagebind_shapes(width: int) -> dict[str, list[int]]:
    images, trunk = "modality_preprocessors.vision", "modality_trunks.vision"
    found = {f"{images}.cls_token": [1, 1, width], f"{images}.rgbt_stem.proj.1.weight": [width, 3, 2, 14, 14]}
    found |= {f"{images}.pos_embedding_helper.pos_embed": [1, 1 + 16 * 16, width]}
    found |= layer(f"{trunk}.pre_transformer_layer.0", width)
    for number in range(4):
        block = f"{trunk}.blocks.{number}"
        found |= layer(f"{block}.norm_1", width) | layer(f"{block}.norm_2", width) | attention(f"{block}.attn", width)
        found |= layer(f"{block}.mlp.fc1", 4 * width, width) | layer(f"{block}.mlp.fc2", width, 4 * width)
    return found | layer("modality_heads.vision.0", width) | {"modality_heads.vision.2.weight": [32, width]}


def residual() -> Tensors:
    """Each patch minus the row of the bank with the highest cosine similarity."""
    found = {}
    for level in range(2):
        features = value(f"residual.features.{level}", (2, 32, 16, 16)).double()
        bank = value(f"residual.bank.{level}", (512, 32)).double()
        matched = torch.empty_like(features)
        for image, y, x in product(range(2), range(16), range(16)):
            patch = features[image, :, y, x]
            similarities = bank @ patch / (bank.square().sum(1).sqrt() * patch.square().sum().sqrt())
            matched[image, :, y, x] = bank[similarities.argmax()]
        found |= {f"matched.{level}": matched, f"residual.{level}": features - matched}
    return found


def projected(weights: Mapping[str, Tensor], levels: Sequence[Tensor], heads: int = 16) -> list[Tensor]:
    """The projector of maps (B, C, h, w), by the equations of the paper."""
    found = []
    for number, level in enumerate(levels, start=1):
        own = {key.partition(".")[2]: weight for key, weight in weights.items() if key.startswith(f"l{number}_")}
        tokens = level.flatten(2).transpose(1, 2)
        width = tokens.shape[2]
        references = own["x_ref"][0] @ own["ref_proj.project.weight"][:, :, 0].T + own["ref_proj.project.bias"]
        cross, mlp = "layers.0.cross_attn", "layers.0.mlp"
        wq, wk, wv = own[f"{cross}.in_proj_weight"].chunk(3)
        bq, bk, bv = own[f"{cross}.in_proj_bias"].chunk(3)
        queries, keys, values = tokens @ wq.T + bq, references @ wk.T + bk, references @ wv.T + bv
        attended = []
        for head in range(heads):
            part = slice(head * width // heads, (head + 1) * width // heads)
            scores = queries[..., part] @ keys[:, part].T / (width / heads) ** 0.5
            attended.append(scores.softmax(-1) @ values[:, part])
        out = torch.cat(attended, -1) @ own[f"{cross}.out_proj.weight"].T + own[f"{cross}.out_proj.bias"]
        tokens = tokens - out
        hidden = tokens @ own[f"{mlp}.fc1.weight"].T + own[f"{mlp}.fc1.bias"]
        squeezed = hidden.mean(1, keepdim=True) @ own[f"{mlp}.se.fc1.weight"].T + own[f"{mlp}.se.fc1.bias"]
        gate = squeezed.relu() @ own[f"{mlp}.se.fc2.weight"].T + own[f"{mlp}.se.fc2.bias"]
        hidden = F.gelu(hidden * gate.sigmoid())
        tokens = tokens + hidden @ own[f"{mlp}.fc2.weight"].T + own[f"{mlp}.fc2.bias"]
        found.append(tokens.transpose(1, 2).reshape(level.shape))
    return found


def projector_weights(prefix: str) -> Tensors:
    weights = fill(projector_shapes(32), prefix)
    return {key: weight.double().requires_grad_() for key, weight in weights.items()}


def projector() -> Tensors:
    inputs = [value(f"projector.input.{level}", (2, 32, 16, 16)).double() for level in LEVELS]
    outputs = projected(projector_weights("projector."), inputs)
    return {f"output.{level}": output.detach() for level, output in enumerate(outputs)}


def projector_grad() -> Tensors:
    """Gradients of the sum over the levels of the mean square of the outputs."""
    weights = projector_weights("projector.")
    inputs = [value(f"projector.input.{level}", (2, 32, 16, 16)).double() for level in LEVELS]
    loss = torch.stack([output.square().mean() for output in projected(weights, inputs)]).sum()
    loss.backward()
    kept = (
        "l2_proj.layers.0.cross_attn.in_proj_weight",
        "l3_proj.ref_proj.project.weight",
        "l4_proj.layers.0.mlp.se.fc1.weight",
    )
    found = {key: gradient(weights[key]) for key in kept}
    return found | {"loss": loss.detach(), "l1_proj.x_ref.norm": gradient(weights["l1_proj.x_ref"]).norm()}


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def angle_loss(first: Tensor, second: Tensor, anomalous: Tensor, center: Tensor | None = None) -> Tensor:
    """Over both views of each patch: minus the log of its twin's share among the patches of the other label."""
    both = torch.cat([first, second]) - (0 if center is None else center)
    both = both / both.square().sum(1, keepdim=True).sqrt()
    likeness = (both @ both.T / 0.15).exp()
    count = len(first)
    twins = torch.arange(2 * count).roll(count)
    labels = torch.cat([anomalous, anomalous])
    others = (likeness * (labels[:, None] != labels)).sum(1)
    return -(likeness[torch.arange(2 * count), twins] / others).log().mean()


def norm_loss(features: Tensor, anomalous: Tensor) -> Tensor:
    """Normal patches between the radii, anomalous ones beyond the outer radius and a margin of 0.75."""
    norms = (features.square().sum(1).sqrt() + 1).sqrt() - 1
    outer = min(0.4, 0.9 * norms[anomalous].min().item()) if anomalous.any() else 0.4
    normal = norms[~anomalous]
    excesses = (normal - outer, 0.99 * outer - normal, outer + 0.75 - norms[anomalous])
    costs = [excess[excess > 0] for excess in excesses]
    return torch.stack([(x.detach().exp() * (1 + x.exp()).log()).mean() for x in costs if len(x)]).sum()


def losses() -> Tensors:
    e1 = value("loss.e1", (400, 32))
    e2 = e1 + value("loss.e2", (400, 32), 0.3)
    mask = torch.arange(400) % 9 == 0
    found: Tensors = {}
    for name, center in (("no_center", None), ("center", value("loss.center", (32,), 0.2).double())):
        first, second = e1.double().requires_grad_(), e2.double().requires_grad_()
        loss = angle_loss(first, second, mask, center)
        loss.backward()
        found |= {f"angle.{name}.loss": loss.detach()}
        found |= {f"angle.{name}.grad_e1": gradient(first), f"angle.{name}.grad_e2": gradient(second)}
    none, all_ = torch.zeros_like(mask), torch.ones_like(mask)
    cases = {"mixed": (0.35, mask), "all_normal": (0.35, none), "all_abnormal": (0.35, all_)}
    for name, (scale, anomalous) in (cases | {"large": (3.0, mask), "tiny": (0.01, mask)}).items():
        features = (e1 * scale).double().requires_grad_()
        loss = norm_loss(features, anomalous)
        loss.backward()
        found |= {f"norm.{name}.loss": loss.detach(), f"norm.{name}.grad": gradient(features)}
    return found


def crowded(masks: Tensor, patch: int) -> Tensor:
    """Patches (B, cells) with more than 32 pixels of the mask (B, H, W)."""
    cells = masks.unfold(1, patch, patch).unfold(2, patch, patch)
    return (cells.sum((3, 4)) > 32).flatten(1)


def nearest(masks: Tensor, side: int) -> Tensor:
    """The pixel (B, side, side) at the upper left of each cell."""
    at = [index * masks.shape[1] // side for index in range(side)]
    return masks[:, at][:, :, at]


def masks() -> Tensors:
    drawn = torch.zeros(3, 224, 224)
    drawn[0, 30:36, 40:46] = drawn[0, 100:140, 90:150] = 1
    drawn[1, ::2, ::3] = 1
    drawn[2, 13:15] = drawn[2, 200:, 200:] = 1
    found = {f"patchify{patch}": crowded(drawn, patch).float() for patch in (14, 16)}
    return found | {f"nearest{side}": nearest(drawn, side)[:, None] for side in (14, 16)}


def feature_norm() -> Tensors:
    """Norms of the patches, interpolated between their centers at the corners, averaged and smoothed."""
    size, side = 224, 16
    at = np.arange(size) * (side - 1) / (size - 1)
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(side)))
    maps = np.zeros((3, size, size))
    for level in LEVELS:
        norms = np.linalg.norm(
            value(f"scoring.features.{level}", (3, 32, side, side), 0.3).numpy().astype(float), axis=1
        )
        maps += weights @ (np.sqrt(norms + 1) - 1) @ weights.T / len(LEVELS)
    smoothed = torch.from_numpy(np.stack([gaussian_filter(image, 4) for image in maps]))
    return {"score_map": smoothed, "image_score": smoothed.amax((1, 2))}


def metrics() -> Tensors:
    """The seven metrics of stored scores, masks and labels; the original rounds all but the last to five decimals."""
    stored = golden("metrics")
    scores, defects = stored["scores"].numpy(), stored["masks"].numpy()
    pairs = (stored["labels"].numpy(), scores.max((1, 2))), (defects.ravel(), scores.ravel())
    values = []
    for truth, found in pairs:
        precision, recall, _ = precision_recall_curve(truth, found)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        values += [roc_auc_score(truth, found), average_precision_score(truth, found), f1.max()]
    return stored | {
        "values": torch.tensor([round(float(v), 5) for v in values] + [coarse_aupro(scores, defects)]).double()
    }


def coarse_aupro(scores: np.ndarray, defects: np.ndarray) -> float:
    """At 200 thresholds: mean share of the regions against false positives below 0.3, which are stretched to 1."""
    regions = [(i, region.coords.T) for i, mask in enumerate(defects) for region in regionprops(label(mask))]
    low, high = scores.min(), scores.max()
    points = []
    for threshold in np.arange(low, high, (high - low) / 200):
        hit = scores > threshold
        overlaps = [hit[image, rows, columns].mean() for image, (rows, columns) in regions]
        points.append((hit[defects == 0].mean(), np.mean(overlaps)))
    false, overlap = np.array([point for point in points if point[0] < 0.3]).T
    return float(auc((false - false.min()) / (false.max() - false.min()), overlap))


def training() -> Tensors:
    """Ten steps of Adam with an L2 penalty, on the angle loss and the norm losses of both views."""
    weights = projector_weights("train.projector.")
    optimizer = torch.optim.Adam(weights.values(), lr=1e-4, weight_decay=5e-4)
    centers = [value(f"train.center.{level}", (32,), 0.1).double() for level in LEVELS]
    trajectory = []
    for step in range(10):
        drawn = torch.zeros(4, 224, 224)
        drawn[1, 20:90, 30:120] = drawn[3, 100 : 121 + 5 * step, 60:160] = 1
        first = [value(f"train.{step}.r1.{level}", (4, 32, 16, 16)) for level in LEVELS]
        second = [value(f"train.{step}.r2.{level}", (4, 32, 16, 16), 0.3) for level in LEVELS]
        second = [one + other for one, other in zip(first, second, strict=True)]
        views = [projected(weights, [level.double() for level in view]) for view in (first, second)]
        angle, norm = torch.zeros(()).double(), torch.zeros(()).double()
        for level in LEVELS:
            e1, e2 = (view[level].permute(0, 2, 3, 1).flatten(0, 2) for view in views)
            angle = angle + angle_loss(e1, e2, crowded(drawn, 14).flatten(), centers[level])
            inside = nearest(drawn, 16).flatten() > 0
            norm = norm + norm_loss(e1, inside) + norm_loss(e2, inside)
        optimizer.zero_grad()
        (angle + norm).backward()
        optimizer.step()
        trajectory.append([angle.item(), norm.item(), (angle + norm).item()])
    final = {
        f"final.{key}": weights[key].detach()
        for key in ("l1_proj.ref_proj.project.bias", "l4_proj.layers.0.mlp.fc2.bias")
    }
    return final | {"losses": torch.tensor(trajectory, dtype=torch.float64)}


MAKERS: dict[str, Callable[[], Tensors]] = {
    "residual": residual,
    "projector": projector,
    "projector_grad": projector_grad,
    "losses": losses,
    "masks": masks,
    "feature_norm": feature_norm,
    "metrics": metrics,
    "training": training,
}


def main(folder: Path) -> None:
    """Write every file that can be made, in the types of the stored ones."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state_dicts.json").write_text(json.dumps(shapes()))
    for name, make in MAKERS.items():
        types = {key: tensor.dtype for key, tensor in golden(name).items()}
        save_file(
            {key: tensor.to(types[key]).contiguous() for key, tensor in make().items()}, folder / f"{name}.safetensors"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
