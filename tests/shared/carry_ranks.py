"""What the processes of tests/test_carry_over.py do; each function runs on every rank of a group."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from perilune.parallel import mesh as meshes
from perilune.pretrain import carry_over, checkpoint, model, presets, rules
from perilune.pretrain import config as configs
from perilune.pretrain.checkpoint_files import CheckpointError
from perilune.pretrain.data.stream import open_stream
from perilune.pretrain.optim import optimizer
from perilune.pretrain.optim.average import average_of
from perilune.pretrain.schema import Config, Contrastive, Data, Parallel, Precision

CONTRASTIVE = Contrastive(
    loss="clip", feature_dim=16, num_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=32
)


def config_of(stage: str, compute: str = "fp32", **parallel: Any) -> Config:
    """`text`: with MTP, without a tower; `vit`: another, dense decoder; `joint`: tower and the text run's decoder."""
    vl, text = presets.get("tiny_vl"), presets.get("tiny")
    model_of = {
        "text": text.model,
        "vit": replace(vl.model, num_layers=2, first_k_dense_replace=2, n_routed_experts=0, hidden_size=32),
        "joint": vl.model,
    }
    return replace(
        vl,
        stage=stage,
        model=model_of[stage],
        vision=text.vision if stage == "text" else vl.vision,
        contrastive=CONTRASTIVE if stage == "vit" else Contrastive(),
        parallel=Parallel(**parallel),
        precision=Precision(compute=compute),  # type: ignore[arg-type]
    )


def built(config: Config, mesh: meshes.Mesh) -> model.Model:
    """Each stage draws other weights; the order of its data is that of the seed which all of them have."""
    seed = config.train.seed + {"text": 3, "vit": 5, "joint": 7}[config.stage]
    return model.build(replace(config, train=replace(config.train, seed=seed)), mesh)


def save_new(config: Config, folder: Path, step: int, data: Path, rows: int, moments: bool = True) -> Path:
    """A run of `config` at `step` that has read `rows` rows of `data`, its moments random numbers."""
    mesh = rules.mesh_of(config, dist.get_world_size())
    meshes.start(mesh, timeout_s=60)
    try:
        net = built(config, mesh)
        optim = optimizer.build(config, net)
        torch.manual_seed(step)
        for one in getattr(optim, "chained_optimizers", [optim]):
            one.init_state_fn(one.optimizer, one.config)
            for state in one.optimizer.state.values():
                state["exp_avg"].normal_()
                state["exp_avg_sq"].uniform_()
                state["step"] = torch.tensor(float(step))
            if (average := average_of(one)) is not None:
                average.begin()
                for values in average.of.values():
                    values.normal_()
        stream = open_stream(_data(data), 1, depth=0)
        state = stream.advance(stream.initial_state(), rows)
        stream.close()
        at = {"step": step, "data": state.to_dict()}
        return checkpoint.save(folder, step, net, optim if moments else None, at, config=config, keep=0)
    finally:
        meshes.stop(leave_group=False)


def take_over(config: Config, sources: list[Path], data: Path, folder: Path) -> dict[str, Any]:
    """A new run of `config` after `sources`, saved in `folder` as it then is."""
    mesh = rules.mesh_of(config, dist.get_world_size())
    meshes.start(mesh, timeout_s=60)
    try:
        net = built(config, mesh)
        optim = optimizer.build(config, net)
        stream = open_stream(_data(data), config.train.seed, depth=0)
        try:
            taken = carry_over.take_over(sources, net, optim, stream)
            ids = stream.global_batch_ids(taken.state, 4)
            stream.check_state(stream.advance(taken.state, 4))
        except CheckpointError as error:
            return {"error": str(error)}
        finally:
            stream.close()
        at = {"step": 0, "data": taken.state.to_dict(), "before": taken.history}
        path = checkpoint.save(folder, 0, net, optim, at, config=config, keep=0)
        return {"path": path, "told": taken.told, "state": taken.state, "history": taken.history, "ids": ids}
    finally:
        meshes.stop(leave_group=False)


def rows_from(data: Path, first: int, rows: int) -> list[tuple[int, int]]:
    """(dataset, row) of the rows that a stream reads after `first` others."""
    stream = open_stream(_data(data), 1, depth=0)
    state = stream.advance(stream.initial_state(), first)
    ids = stream.global_batch_ids(state, rows)
    stream.close()
    return ids


def _data(path: Path) -> Data:
    return Data(path=str(path), seq_len=64, workers=0)


def config_in(path: Path) -> Config:
    """The config that lies in a checkpoint."""
    return configs.load(path / "config.yaml")
