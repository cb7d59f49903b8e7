"""The plan of a run in tokens: how many rows a step takes, and with which rates, from the schedules."""

from __future__ import annotations

from dataclasses import dataclass

from perilune.pretrain import schedule
from perilune.pretrain.schema import Config


@dataclass(frozen=True)
class StepPlan:
    """What one step is to do; all but `rows` goes to `train_step`."""

    rows: int
    lr: float
    mtp_weight: float  # lambda, V3 section 2.2
    bias_speed: float  # gamma, V3 section 2.1.2


def rows_multiple(config: Config, dp: int) -> int:
    """What the rows of a step must divide by on `dp` data-parallel ranks."""
    # Interleaved stages pass micro-batches on in groups of pp.
    at_once = config.parallel.pp if config.parallel.vpp > 1 else 1
    return dp * config.train.micro_batch_size * at_once


class Timetable:
    """The schedules of `config` for `dp` data-parallel ranks."""

    def __init__(self, config: Config, dp: int) -> None:
        self._config = config
        self._multiple = rows_multiple(config, dp)
        self.total_tokens = schedule.total_tokens(config.train, config.data.seq_len, self._multiple)
        self.total_steps = schedule.total_steps(config.train, config.data.seq_len, self._multiple)

    def rows(self, tokens: int) -> int:
        """Rows of the step that starts after `tokens` tokens."""
        return schedule.global_batch_rows(self._config.train, self._config.data.seq_len, tokens, self._multiple)

    def at(self, tokens: int) -> StepPlan:
        """The step that starts after `tokens` tokens. The learning rate is that of the step's last token."""
        c, end = self._config, self.total_tokens
        rows = self.rows(tokens)
        return StepPlan(
            rows=rows,
            lr=schedule.learning_rate(c.optim, c.schedule, tokens + rows * c.data.seq_len, end),
            mtp_weight=schedule.mtp_weight(c.schedule, tokens, end),
            bias_speed=schedule.bias_update_speed(c.schedule, tokens, end),
        )
