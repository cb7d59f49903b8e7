"""The stage map of a model: its costs against its FLOPs, and one layout for counts, rules and build."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from perilune.moe import backbone
from perilune.parallel import mesh as meshes
from perilune.parallel.mesh import Mesh
from perilune.pretrain import model as models
from perilune.pretrain import presets
from perilune.pretrain.errors import InputError
from perilune.pretrain.plan.counts import flops_per_token
from perilune.pretrain.plan.stages import layout_of, picture, stage_map, stages_of, work_of
from perilune.pretrain.schema import Config, Model, Parallel

TINY = presets.get("tiny")
MODELS = {name: presets.get(name).model for name in presets.names()} | {
    "dense": replace(TINY.model, n_routed_experts=0, first_k_dense_replace=3),
    "experts only, two depths": replace(TINY.model, first_k_dense_replace=0, num_nextn_predict_layers=2),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_costs_are_the_models_flops(name: str) -> None:
    model = MODELS[name]
    work = work_of(model)
    flops = flops_per_token(model, model.max_position_embeddings)
    whole = stage_map(model, Parallel())
    assert whole.loads(work) == [pytest.approx(flops.forward, rel=1e-12)]
    one_more = replace(model, num_layers=model.num_layers + 1)
    if model.n_routed_experts:  # a further layer is of the last one's kind
        more = flops_per_token(one_more, model.max_position_embeddings).forward - flops.forward
        assert work.moe == pytest.approx(more, rel=1e-9)


def test_what_is_counted_is_what_is_built() -> None:
    """Without a layout the balanced one, with one that; without a pipeline none."""
    for parallel, layout in [
        (Parallel(), None),
        (Parallel(layout="EtttmL"), None),
        (Parallel(pp=2), "Ettt|mL"),
        (Parallel(pp=2, vpp=2), "E|t|tt|mL"),
        (Parallel(pp=2, layout="Et,|ttmL"), "Et,|ttmL"),
    ]:
        config = replace(TINY, parallel=parallel)
        mesh = Mesh(parallel.pp, pp=parallel.pp, vpp=parallel.vpp)
        assert layout_of(config.model, parallel) == models.backbone_config(config, mesh).layout == layout
    assert [stage.layers for stage in stages_of(TINY.model, Parallel(pp=2))] == [(0, 1, 2), ()]


@pytest.mark.parametrize(
    ("model", "parallel", "message"),
    [
        (TINY.model, Parallel(layout="EttmL"), r"parallel.layout='EttmL' has 1 E, 2 t"),
        (TINY.model, Parallel(pp=2, vpp=3), r"model.num_layers=3 cannot fill .* 6 chunks"),
        (replace(TINY.model, num_layers=0), Parallel(pp=2), r"model.num_layers=0 cannot fill"),
        (replace(TINY.model, hidden_size=-64), Parallel(pp=2), r"a layer must cost something"),
        (replace(TINY.model, hidden_size=-64), Parallel(pp=2, layout="Ett|tmL"), r"a layer must cost something"),
    ],
)
def test_refusals_are_the_users(model: Model, parallel: Parallel, message: str) -> None:
    with pytest.raises(InputError, match=message):
        picture(model, parallel)


def checkpoint_keys(config: Config, layout: str | None) -> list[set[str]]:
    """Names in a checkpoint of what Megatron-core builds on each pipeline rank from `layout`, on the meta device."""
    found = []
    mesh = Mesh(config.parallel.pp, pp=config.parallel.pp, vpp=config.parallel.vpp)
    for rank in range(mesh.pp):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=mesh.world)
        try:
            meshes.start(mesh)
            shape = replace(models.backbone_config(config, mesh), layout=layout)
            with torch.device("meta"):
                parts = [backbone.build(shape, stage) for stage in (range(mesh.vpp) if mesh.vpp > 1 else [None])]
            found.append({entry.key for part in parts for entry in part.sharded_state_dict().values()})
        finally:
            meshes.stop()
    return found


def test_checkpoint_keys_do_not_depend_on_the_layout() -> None:
    four = replace(TINY, model=replace(TINY.model, num_layers=4))
    (whole,) = checkpoint_keys(four, None)
    assert len([key for key in whole if key.startswith("decoder.layers.3.")]) > 5
    interleaved = replace(four, parallel=Parallel(pp=2, vpp=2))
    assert checkpoint_keys(interleaved, None) == checkpoint_keys(interleaved, "Et|t|t|tmL")
    for parallel in (Parallel(pp=2), Parallel(pp=2, vpp=2), Parallel(pp=3), Parallel(pp=2, layout="Etttt|mL")):
        layout = layout_of(four.model, parallel)
        assert layout is not None
        assert set().union(*checkpoint_keys(replace(four, parallel=parallel), layout)) == whole


def test_the_picture_says_for_how_long_rows() -> None:
    assert picture(MODELS["deepseek_v3"], presets.get("deepseek_v3").parallel).splitlines()[-3:] == [
        "   14  MoE 56-59                  5.354   6.2%  ########################",
        "   15  MoE 60, MTP, head          6.589   7.6%  ##############################",
        "most loaded: stage 15, 1.213 of the mean (forward, rows of 4096)",
    ]
