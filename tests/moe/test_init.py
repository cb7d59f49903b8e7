"""Initial weights: the same model in every layout, and numbers that look normal."""

import dataclasses

import torch

from perilune.moe.init import normal_slice
from perilune.parallel.workers import Workers
from perilune.pretrain import presets
from perilune.pretrain.parity import probe
from perilune.pretrain.schema import Parallel


def test_a_slice_is_the_same_cut_of_the_whole() -> None:
    shape = (3000, 700)  # two blocks and a part
    whole = normal_slice(1, "w", shape, (0, 0), shape, 0.5)
    for starts, sizes in [((0, 0), (1, 700)), ((1490, 13), (20, 100)), ((2999, 699), (1, 1))]:
        cut = normal_slice(1, "w", shape, starts, sizes, 0.5)
        assert torch.equal(cut, whole[starts[0] : starts[0] + sizes[0], starts[1] : starts[1] + sizes[1]])
    assert abs(float(whole.std()) - 0.5) < 0.002 and abs(float(whole.mean())) < 0.002
    assert not torch.equal(whole, normal_slice(2, "w", shape, (0, 0), shape, 0.5))
    assert not torch.equal(whole, normal_slice(1, "v", shape, (0, 0), shape, 0.5))


def test_experts_differ_and_are_drawn_one_by_one() -> None:
    whole = normal_slice(1, "e", (4, 6, 5), (0, 0, 0), (4, 6, 5), 1.0)
    assert torch.equal(normal_slice(1, "e", (4, 6, 5), (2, 3, 0), (2, 3, 5), 1.0), whole[2:, 3:])
    assert not torch.equal(whole[0], whole[1])


def test_every_layout_starts_from_the_same_model(workers: Workers) -> None:
    tiny = presets.get("tiny")
    config = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, num_layers=4))
    one = probe.named(config, workers.run(1, probe.initial, config))
    assert all(tensor.isfinite().all() for tensor in one.values()) and len(one) > 100
    for world, parallel in [(2, Parallel(tp=2, etp=2)), (2, Parallel(pp=2)), (4, Parallel(tp=2, ep=4))]:
        layout = dataclasses.replace(config, parallel=parallel)
        other = probe.named(layout, workers.run(world, probe.initial, layout))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
