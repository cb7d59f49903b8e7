"""A training run, told once: config -> mesh -> model -> data -> [step]* -> checkpoint."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state

from perilune.kernels import attention
from perilune.parallel import memory, precision
from perilune.parallel import mesh as meshes
from perilune.pretrain import carry_over, checkpoint, model, rules, vital_signs
from perilune.pretrain.checkpoint_saver import Saver
from perilune.pretrain.data.batch import PackedBatch
from perilune.pretrain.data.dealing import cost_model
from perilune.pretrain.data.quarantine import over_all_ranks
from perilune.pretrain.data.stream import DataState, Stream, open_dataset, open_stream, remote_of, valid_batches
from perilune.pretrain.errors import Preempted
from perilune.pretrain.meter import Meter
from perilune.pretrain.metrics import RunLog
from perilune.pretrain.objective import next_token
from perilune.pretrain.optim import optimizer
from perilune.pretrain.profiling import Trace, explain_out_of_memory
from perilune.pretrain.report import environment
from perilune.pretrain.schema import Config
from perilune.pretrain.signals import Stop
from perilune.pretrain.start import Start
from perilune.pretrain.step import Validation, evaluate, train_step
from perilune.pretrain.timetable import Timetable


def run(config: Config, run_dir: Path, world: int, *, start: Start = Start(), profile: bool = False) -> None:  # noqa: B008
    """Train in this process, one of `world` joined by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, to the end.

    Continues from the newest checkpoint of `run_dir`; a new run begins as `start` says. Raises Preempted once a SIGTERM
    or SIGINT has led to a checkpoint, InputError for data or checkpoints that cannot be used, FloatingPointError after
    too many bad steps.
    """
    stop = Stop()
    mesh = rules.mesh_of(config, world)
    meshes.start(mesh)
    net = model.build(config, mesh)
    optim = optimizer.build(config, net)
    depth, vocab_size = config.model.num_nextn_predict_layers, config.model.vocab_size
    stream = open_stream(config.data, config.train.seed, depth=depth, vocab_size=vocab_size, vision=config.vision,
                         cost=cost_model(config.model, config.vision), agree=over_all_ranks)  # fmt: skip
    vital_signs.beat("loading")
    step, begun = _position(run_dir, net, optim, stream, start)
    state, plan = begun.state, Timetable(config, mesh.dp)
    vital_signs.beat("loading", step, plan.total_steps)  # a run that is at its end takes no step that would tell it
    meter = Meter(config, world, mesh.dp)

    with ExitStack() as stack:
        stack.callback(stream.close)
        log = RunLog(run_dir, step=step, total_steps=plan.total_steps, log_every=config.train.log_every,
                     writes=dist.get_rank() == 0)  # fmt: skip
        stack.callback(log.close)
        if dist.get_rank() == 0:
            environment.record(run_dir, world, step)
        by = attention.name(config.kernels.attention)
        log.say(f"{mesh.describe()} dp={mesh.dp}; {precision.name()}; attention by {by}; {meter.name}")
        log.say(f"step {step} of {plan.total_steps}, {state.tokens:,} of {plan.total_tokens:,} tokens are done")
        for line in begun.told:
            log.say(line)
        trace = Trace(run_dir) if profile else None
        saver = Saver(run_dir / "checkpoints", config)
        stack.callback(saver.close)
        stack.enter_context(vital_signs.watched())  # before the rest is closed
        if meshes.device().type == "cpu":
            memory.keep_freed()
        bad_in_a_row = 0
        while step < plan.total_steps:
            vital_signs.beat("step", step, plan.total_steps)
            meter.start()
            todo = plan.at(state.tokens)
            rank, known = parallel_state.get_data_parallel_rank(), len(state.quarantine)
            batches, state = stream.read(state, todo.rows, rank, mesh.dp, config.train.micro_batch_size, plan.rows)
            for found in state.quarantine[known:]:
                log.say(f"  damaged: {found['reason']} Row {found['replaced_by']} of the dataset takes its place")
            meter.data_ready()
            with explain_out_of_memory(run_dir, net.bare(), optim):
                result = train_step(net, optim, batches, next_token, todo, clip=config.optim.clip,
                                    stop=stop.asked or saver.failed, before_update=saver.before_update)  # fmt: skip
            step, state = step + 1, stream.advance(state, todo.rows)
            figures = meter.figures(todo, batches)
            if config.valid.every and (step % config.valid.every == 0 or step == plan.total_steps):
                vital_signs.beat("validating", step)
                log.validated(*_validate(config, net, stream, mesh.dp))
            log.step(step, state.tokens, result, figures | {"quarantined": len(state.quarantine)})
            bad_in_a_row = bad_in_a_row + 1 if result.skipped else 0
            if result.skipped:
                log.say(f"  not finite, nothing changed; the global batch's rows: {_all_rows(batches)}")
            if bad_in_a_row >= config.train.nonfinite_limit:
                saver.finish()
                raise FloatingPointError(_not_finite(run_dir, bad_in_a_row, step))
            if trace is not None and trace.step(log.say):
                trace = None

            every = config.train.save_every
            if step == plan.total_steps or result.stop or (every and step % every == 0):
                # After its line in the metrics, so that none can lack.
                at = {"step": step, "data": state.to_dict(), "before": begun.history}
                vital_signs.beat("saving", step)
                net.settle()
                saver.save(step, net, optim, at)
            if result.stop and step < plan.total_steps:
                saver.finish()
                stop.over()
                raise Preempted(f"stopped on request after step {step} of {plan.total_steps}, checkpoint written")
        saver.finish()
        stop.over()
    meshes.stop()


def _position(
    run_dir: Path, net: model.Model, optim: object, stream: Stream, start: Start
) -> tuple[int, carry_over.Taken]:
    """(step, data and runs before) where the run stands: at its newest checkpoint, or at step 0 as `start` says."""
    newest = checkpoint.latest(run_dir / "checkpoints")
    if newest is None:
        if start.after:
            return 0, carry_over.take_over(start.after, net, optim, stream)
        if start.init_from is not None:
            checkpoint.init_from(start.init_from, net, optim)
        return 0, carry_over.Taken(stream.initial_state(), [], [])
    saved = checkpoint.load(newest, net, optim)
    state = stream.found_again(DataState.from_dict(saved["data"]))
    told = ["--init-from and --after were for this run's start; it continues from its own checkpoint"]
    return saved["step"], carry_over.Taken(state, saved.get("before", []), told if start != Start() else [])


def _not_finite(run_dir: Path, in_a_row: int, step: int) -> str:
    """What is told of a run that ends so."""
    newest = checkpoint.latest(run_dir / "checkpoints")
    left = f"the last checkpoint is intact: {newest}" if newest else "there is no checkpoint yet"
    return f"{in_a_row} steps in a row up to step {step} were not finite (train.nonfinite_limit); {left}"


def _all_rows(batches: list[PackedBatch]) -> str:
    """The sample ids of the whole global batch; every data-parallel rank calls this."""
    group = parallel_state.get_data_parallel_group()
    parts: list[list[str]] = [[] for _ in range(group.size())]
    dist.all_gather_object(parts, [name for batch in batches for name in batch.sample_ids], group=group)
    return ", ".join(name for part in parts for name in part)


def _validate(config: Config, net: model.Model, stream: Stream, dp: int) -> tuple[Validation, str]:
    """The losses on the validation set, and its fingerprint."""
    dataset = open_dataset(str(config.valid.path), config.data.seq_len, config.model.vocab_size, remote_of(config.data),
                           config.vision, tokenizer_fingerprint=stream.tokenizer_fingerprint)  # fmt: skip
    with closing(dataset):
        batches = valid_batches(
            dataset,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=dp,
            micro_batch_size=config.train.micro_batch_size,
            depth=config.model.num_nextn_predict_layers,
            document_mask=config.data.document_mask,
            max_rows=config.valid.steps * config.train.global_batch_size,
            vision=config.vision,
        )
        return evaluate(net, batches, next_token), dataset.fingerprint
