"""A model that has learnt four glyphs by heart, and what is asked of it: functions of `parallel.workers.Workers`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch

from perilune.moe.backbone import packed_params
from perilune.moe.decode import Decoder
from perilune.parallel import mesh as meshes
from perilune.pretrain import checkpoint, presets
from perilune.pretrain import config as configs
from perilune.pretrain import model as models
from perilune.pretrain.data.pairs import pairs_of
from perilune.pretrain.data.reader import PackedDataset
from perilune.pretrain.data.stream import valid_batches
from perilune.pretrain.errors import InputError
from perilune.pretrain.evaluate import captions, pairs
from perilune.pretrain.evaluate.asked import read_classes
from perilune.pretrain.evaluate.generate import generate
from perilune.pretrain.evaluate.load import Loaded, open_model
from perilune.pretrain.evaluate.prompts import Picture, encode_prompts, read_picture, shown
from perilune.pretrain.hf.verify_images import Prompt
from perilune.pretrain.objective import next_token
from perilune.pretrain.optim import optimizer
from perilune.pretrain.schema import Contrastive, Data, Valid
from perilune.pretrain.step import evaluate, train_step
from perilune.pretrain.timetable import StepPlan
from perilune.vision import vlm

STEP = 40


def learn(run: Path, data: Path, vocab_size: int, seq_len: int) -> tuple[float, float]:
    """A run with a checkpoint after STEP steps on all of `data`; returns its (loss, bits a byte) as training logs."""
    tiny = presets.get("tiny_vl")
    config = replace(
        tiny,
        model=replace(tiny.model, vocab_size=vocab_size, init_std=0.05, max_position_embeddings=seq_len),
        vision=replace(tiny.vision, init_std=0.05),
        contrastive=Contrastive(
            "siglip", feature_dim=32, num_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=64
        ),
        data=Data(path=str(data), seq_len=seq_len),
        valid=Valid(path=str(data), every=STEP),
    )
    meshes.start(meshes.Mesh(1))
    net = models.build(config, meshes.Mesh(1))
    adam = optimizer.build(config, net)

    def batches() -> list:  # type: ignore[type-arg]
        return list(
            valid_batches(PackedDataset(data), dp_rank=0, dp_size=1, micro_batch_size=1, depth=0, document_mask=True,
                          vision=config.vision)
        )  # fmt: skip

    rows = [batch for batch, _ in batches()]
    for step in range(STEP):
        todo = StepPlan(rows=len(rows), lr=8e-3 * min(1.0, (STEP - step) / 20), mtp_weight=0.0, bias_speed=0.0)
        train_step(net, adam, rows, next_token, todo, clip=1.0)
    checkpoint.save(run / "checkpoints", STEP, net, None, {"step": STEP, "data": {}}, config=config, keep=0)
    configs.save(config, run / "config.yaml")
    return evaluate(net, iter(batches()), next_token)[:2]


def _open(path: Path) -> Loaded:
    meshes.start(meshes.Mesh(1))
    return open_model(path)


@dataclass(frozen=True)
class Asked:
    """Prompts as `encode_prompts` makes them, with the places of the images' features end to end."""

    rows: list[list[int]]
    index: list[int]
    pictures: list[Picture]  # of all prompts


def asked(path: Path, prompts: Sequence[str], files: Sequence[Path]) -> Asked:
    loaded = _open(path)
    pictures = [read_picture(file, loaded.need_tower()) for file in files]
    rows, images = encode_prompts(loaded, prompts, 1, pictures)
    assert images is not None
    return Asked(rows, images.places_F.tolist(), pictures * len(prompts))


def decoded_and_whole(path: Path, what: Asked, more: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, steps, V] after each prompt and each of its `more` tokens: by the cache, and from whole forwards."""
    loaded = _open(path)
    net, decoder = loaded.net, Decoder(loaded.net)
    images = shown(what.pictures, what.index, sum(map(len, what.rows)))
    steps, outs = len(more[0]), []
    with torch.no_grad():
        given = images.places_F, net.features(images)[images.features_F]
    logits, cache = decoder.prefill(what.rows, max(map(len, what.rows)) + steps, given)
    cached = [logits]
    for at in range(steps):
        cached.append(decoder.step(torch.tensor([row[at] for row in more]), cache))
    start, each = 0, len(what.pictures) // len(what.rows)
    for number, (row, extra) in enumerate(zip(what.rows, more, strict=True)):
        index = [place - start for place in what.index if start <= place < start + len(row)]
        ids = torch.tensor([row + extra])
        alone = shown(what.pictures[number * each : (number + 1) * each], index, ids.numel())
        net.scale.tokens_per_row = ids.numel()
        with torch.no_grad():
            whole = net(
                input_ids=ids, position_ids=torch.arange(ids.numel())[None], attention_mask=None, labels=None,
                images=alone, packed_seq_params=packed_params(torch.tensor([0, ids.numel()], dtype=torch.int32),
                                                              ids.numel()),
            )  # fmt: skip
        outs.append(whole[0, len(row) - 1 :].float())
        start += len(row)
    return torch.stack(cached, dim=1), torch.stack(outs)


@dataclass(frozen=True)
class Compared:
    """Features of all pairs: by `evaluate/pairs.py`, and by the forward pass of training's pairs, text after text."""

    mine: pairs.Features
    images_BD: torch.Tensor
    texts_BD: torch.Tensor
    texts: list[str]
    by_class: dict[str, object]  # `pairs.zero_shot` among the classes of a file


def compared(path: Path, data: Path, classes: Path) -> Compared:
    """On the model at `path`."""
    loaded = _open(path)
    dataset, text, net = PackedDataset(data), loaded.need_text(), pairs.comparing(loaded)
    assert net is not None
    found = captions.find(dataset, text.tokenizer)
    mine = pairs.features(loaded, dataset, found, loaded.need_tower())
    ((batch, _),) = valid_batches(dataset, dp_rank=0, dp_size=1, micro_batch_size=1, depth=0, document_mask=True,
                                  vision=loaded.vision)  # fmt: skip
    trained = pairs_of(batch)
    nowhere = torch.zeros(0, dtype=torch.int64)
    with torch.no_grad():
        images = net.image_features(vlm.Images(batch.patches, batch.grids, nowhere, nowhere))
        ends = trained.cu_seqlens.tolist()
        texts = [trained.tokens_X[a:b] for a, b in pairwise(ends)]
        each = [net.text_features(one, torch.tensor([0, len(one)], dtype=torch.int32)) for one in texts]
    dataset.close()
    return Compared(mine, images[trained.images_B], torch.cat(each), [text.tokenizer.decode(one) for one in texts],
                    pairs.zero_shot(loaded, mine, read_classes(classes)))  # fmt: skip


def continued(path: Path, prompt: Prompt, new: int) -> list[int]:
    """Greedy, by the model at `path` after a prompt with images."""
    images = vlm.images_of(prompt.patches, prompt.grids, torch.tensor(prompt.index), len(prompt.ids))
    return list(generate(_open(path).net, [prompt.ids], new, images=images)[0].tokens)


def described(path: Path, files: Sequence[Path]) -> tuple[list[str], int, bool]:
    """What the model at `path` says to each image alone; its limit of patches; whether it compares them with texts."""
    loaded = _open(path)
    text, found = loaded.need_text(), []
    for file in files:
        rows, images = encode_prompts(loaded, [""], 20, [read_picture(file, loaded.need_tower())])
        (said,) = generate(loaded.net, rows, 20, images=images, eos_ids=loaded.ends())
        found.append(text.tokenizer.decode([token for token in said.tokens if token not in loaded.ends()]))
    return found, loaded.patch_limit, pairs.comparing(loaded) is not None


def refusals(path: Path, text_model: Path, file: Path) -> list[str]:
    """What is said to prompts that do not fit their images, and to images for a model that sees none."""
    loaded = _open(path)
    picture = read_picture(file, loaded.need_tower())
    limit = loaded.model.max_position_embeddings
    actions: list[Callable[[], object]] = [
        lambda: encode_prompts(loaded, ["<image> and <image>"], 1, [picture] * 3),
        lambda: encode_prompts(loaded, [""], 1, [picture] * limit),
        lambda: read_picture(Path(__file__), loaded.need_tower()),
        lambda: open_model(text_model).need_tower(),
    ]
    said = []
    for action in actions:
        try:
            action()
        except InputError as error:
            said.append(str(error))
    return said
