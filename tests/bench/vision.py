"""Patches a second of the tower, forward and backward: packed, beside the same padded, and beside transformers'.

    .venv/bin/python tests/bench/vision.py [--rounds 5] [--images 8] [--full] [--json FILE]

A batch is images whose two sides are drawn apart, log-uniform between 112 and 672 pixels (sides of images on the web
spread over orders of magnitude, and few are large), in whole cells of 28 pixels: at most 2304 patches of the 4096 that
an image may have. The tower
has MoonViT's kind of layers, 6 of hidden size 384 with 6 heads and an FFN of 1536 (`--full`: MoonViT's own sizes, 27 of
1152; give it fewer images), its table of 64 x 64 positions, fp32. Each runs in one process with all its threads, and
only patches of images count.

Packed is `vision/moonvit.py`. Padded is what a fixed shape costs: sequences filled up to the longest of the batch, one
batched SDPA a layer with the filling masked, from the same weights, by plain PyTorch; patches are embedded and get
positions and angles before they are filled up, so that it pays for filling in the blocks alone. transformers is its
Kimi-K2.5 tower (of single frames, which is Kimi-VL's) on the packed images, with the faster of the attentions that a
CPU has, each tried twice. Features and the gradient of every weight must agree before a round is timed. Rounds
alternate, so that a machine whose speed drifts is fair to all; a figure is the median of the rounds, a ratio that of
the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "shared"))

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from kimi_tower import theirs
from transformers.models.kimi_k25.modeling_kimi_k25 import Kimi_K25VisionConfig, Kimi_K25VisionModel

from perilune.moe.init import draw_weights
from perilune.parallel import mesh as meshes
from perilune.pretrain.schema import Vision
from perilune.vision.moonvit import MoonViT, VisionConfig, merged, turns

SMALL = Vision(num_layers=6, hidden_size=384, num_attention_heads=6, intermediate_size=1536)
FULL = Vision(num_layers=27)
SIDES, CELL = (112, 672), 28
ATTENTIONS = ("sdpa", "eager")
APART = 1e-4  # of features, of the largest; of the gradient of a weight, of its norm
Grids = list[tuple[int, int]]
Pass = Callable[[], torch.Tensor]  # features [M, 4, H] with their graph


def images(count: int, seed: int) -> tuple[torch.Tensor, Grids]:
    """(patches [P, 3, 14, 14], their (down, across))."""
    rng = np.random.default_rng(seed)
    grids: Grids = []
    for sides in np.exp(rng.uniform(*np.log(SIDES), (count, 2))):
        down, across = (2 * round(side / CELL) for side in sides)
        grids.append((down, across))
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(d * a for d, a in grids), 3, 14, 14, generator=generator), grids


def padded(tower: MoonViT, vision: Vision, patches: torch.Tensor, grids: Grids) -> torch.Tensor:
    """The tower's features by sequences of one length."""
    weights = dict(tower.named_parameters())
    H, N = vision.hidden_size, vision.num_attention_heads
    lengths = [down * across for down, across in grids]
    rows = torch.nn.utils.rnn.pad_sequence(tower.patch_embed(patches, grids).split(lengths), batch_first=True)
    B, P = rows.shape[:2]
    real_BP = torch.arange(P) < torch.tensor(lengths)[:, None]
    turned_by = [turns(*grid, H // N, vision.rope_theta) for grid in grids]
    turn_B1PD = torch.nn.utils.rnn.pad_sequence(turned_by, batch_first=True)[:, None]

    def turned(x_BNPD: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x_BNPD.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn_B1PD).flatten(-2)

    for layer in range(vision.num_layers):

        def linear(x: torch.Tensor, name: str, at: str = f"encoder.layers.{layer}.") -> torch.Tensor:
            return F.linear(x, weights[f"{at}{name}.weight"], weights[f"{at}{name}.bias"])

        def norm(x: torch.Tensor, name: str, at: str = f"encoder.layers.{layer}.") -> torch.Tensor:
            return F.layer_norm(x, (H,), weights[f"{at}{name}.weight"], weights[f"{at}{name}.bias"], 1e-5)

        qkv = linear(norm(rows, "input_layernorm"), "self_attention.linear_qkv")
        q, k, v = qkv.view(B, P, N, 3, H // N).permute(3, 0, 2, 1, 4)
        seen = F.scaled_dot_product_attention(turned(q), turned(k), v, attn_mask=real_BP[:, None, None])
        rows = rows + linear(seen.transpose(1, 2).flatten(2), "self_attention.linear_proj")
        wide = F.gelu(linear(norm(rows, "pre_mlp_layernorm"), "mlp.linear_fc1"), approximate="tanh")
        rows = rows + linear(wide, "mlp.linear_fc2")
    last = tower.encoder.final_layernorm
    return merged(F.layer_norm(rows[real_BP], (H,), last.weight, last.bias, 1e-5), grids)


def rival(tower: MoonViT, vision: Vision, attention: str) -> Kimi_K25VisionModel:
    """transformers' tower with the same weights."""
    config = Kimi_K25VisionConfig(
        hidden_size=vision.hidden_size, num_attention_heads=vision.num_attention_heads,
        num_hidden_layers=vision.num_layers, intermediate_size=vision.intermediate_size,
        pos_emb_height=vision.pos_emb_height, pos_emb_width=vision.pos_emb_width,
    )  # fmt: skip
    config._attn_implementation = attention
    net = Kimi_K25VisionModel(config)
    net.load_state_dict(theirs({name: p.detach() for name, p in tower.named_parameters()}, vision))
    return net.train()


def compare(ways: dict[str, Pass], nets: dict[str, torch.nn.Module], vision: Vision) -> None:
    """Raises SystemExit where features or gradients of one are not the first's."""
    upstream: torch.Tensor | None = None
    for name, way in ways.items():
        net = nets[name]
        net.zero_grad()
        features = way()
        if upstream is None:
            upstream = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
            first = features.detach()
        (features * upstream).sum().backward()
        gradients = {key: p.grad.clone() for key, p in net.named_parameters() if p.grad is not None}
        net.zero_grad()
        if isinstance(net, MoonViT):
            gradients = theirs(gradients, vision)
        if name == next(iter(ways)):
            expected = gradients
        away = {"features": float((features.detach() - first).abs().max() / first.abs().max())}
        for key, wanted in expected.items():
            if "k_proj.bias" not in key:  # softmax forgets it: rounding is all there is
                away[key] = float((gradients[key] - wanted).norm() / wanted.norm())
        worst = max(away, key=lambda key: away[key])
        print(f"{name}: farthest from packed is {worst}, by {away[worst]:.1e}")
        if not away[worst] <= APART or gradients.keys() != expected.keys():
            raise SystemExit(f"{name} is not the same computation: {worst} is {away[worst]:.1e} away, of {APART:g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=4, help="of a batch")
    parser.add_argument("--full", action="store_true", help="MoonViT's own sizes")
    parser.add_argument("--json", type=Path, help="write the ratios there")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # that Transformer Engine and apex are not here
    vision = FULL if options.full else SMALL
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = meshes.Mesh(1)
    meshes.start(mesh)
    tower = MoonViT(VisionConfig(vision, 0, mesh))
    draw_weights(tower, seed=1, std=0.05)
    patches, grids = images(options.images, seed=0)
    frames = torch.tensor([[1, *grid] for grid in grids])
    nets: dict[str, torch.nn.Module] = {"packed": tower, "padded": tower}
    ways: dict[str, Pass] = {
        "packed": lambda: tower(patches, torch.tensor(grids)),
        "padded": lambda: padded(tower, vision, patches, grids),
    }
    for attention in ATTENTIONS:
        name = f"transformers {attention}"
        nets[name] = net = rival(tower, vision, attention)
        ways[name] = lambda net=net: net(pixel_values=patches, grid_thw=frames).pooler_output  # type: ignore[misc]
    count, most = len(patches), max(down * across for down, across in grids)
    print(f"torch {torch.__version__}, transformers {version('transformers')}, {os.cpu_count()} cores, "
          f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")  # fmt: skip
    print(f"{len(grids)} images of {sorted(d * a for d, a in grids)} patches, {count} in all; padded "
          f"{len(grids) * most}, of which {count / len(grids) / most:.0%} are of images")  # fmt: skip
    compare(ways, nets, vision)

    def seconds(name: str) -> float:
        began = time.perf_counter()
        ways[name]().sum().backward()
        took = time.perf_counter() - began
        nets[name].zero_grad()
        return took

    theirs_by = [name for name in ways if name.startswith("transformers")]
    fastest = min(theirs_by, key=lambda name: min(seconds(name) for _ in range(2)))
    rates: dict[str, list[float]] = {name: [] for name in ("packed", "padded", fastest)}
    for _ in range(options.rounds):
        for name, found_rates in rates.items():
            found_rates.append(count / seconds(name))
    median = {name: statistics.median(found) for name, found in rates.items()}
    print("patches/s: " + ", ".join(f"{name} {rate:,.0f}" for name, rate in median.items())
          + f"; load {os.getloadavg()[0]:.1f}")  # fmt: skip
    found: list[dict[str, Any]] = []
    for name, other in (("vision_packed_vs_padded", "padded"), ("vision_tower_vs_transformers", fastest)):
        ratio = statistics.median(a / b for a, b in zip(rates["packed"], rates[other], strict=True))
        print(f"{name} ({other}): {ratio:.2f}")
        found.append(
            {"name": name, "ours": median["packed"], "rival": median[other], "ratio": ratio, "unit": "patches/s"}
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
