"""A store in, a training run with settings for data of its size out. No constants belong to a data set."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from elasticrec.data.plan import PlanConfig
from elasticrec.data.sequences import Int64, Store
from elasticrec.data.split import LeaveOneOut, split
from elasticrec.evaluation.ranking import EvaluationConfig
from elasticrec.model.block import BlockConfig
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.network import NetworkConfig
from elasticrec.model.sampled import recommended_loss
from elasticrec.training.optimizer import OptimizerConfig
from elasticrec.training.run import RunConfig, ValidationConfig

LENGTHS = (16, 32, 50, 64, 100, 128, 200)  # the last is what public benchmarks of long histories use
VALIDATIONS = 40  # times the validation cases are ranked in a whole run
FEW_REPEATS = 0.01  # below, what a user had already is taken for no answer, neither in training nor when ranking
SAMPLED_USERS = 10_000  # whose histories are searched for repeats


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What the settings follow from."""

    n_items: int
    n_users: int  # with something to predict
    n_events: int  # that train
    long_history: int  # training events of a user, 90th percentile
    repeats: float  # share of training events with an item that their user had before


def facts_of(store: Store) -> Facts:
    """Counts the training events of a leave-one-out split."""
    cut = split(LeaveOneOut(), store.sequences)
    length_U = cut.train_end_U - cut.train_start_U
    return Facts(
        n_items=store.n_items,
        n_users=int(np.count_nonzero(length_U >= 2)),
        n_events=int(length_U.sum()),
        long_history=int(np.percentile(length_U, 90)),
        repeats=repeats_of(store.sequences.item_E, cut.train_start_U, cut.train_end_U),
    )


def repeats_of(item_E: npt.NDArray[np.int32], start_U: Int64, end_U: Int64) -> float:
    """Share of events with an item that their user had before, by a sample of users that is always the same."""
    users = np.random.default_rng(0).permutation(len(start_U))[:SAMPLED_USERS]
    events = int((end_U - start_U)[users].sum())
    different = sum(len(np.unique(item_E[start_U[user] : end_U[user]])) for user in users)
    return 1 - different / events if events else 0.0


def recommended(store: Store, epochs: int | None = None) -> RunConfig:
    """The run for this store; its name and folders are the caller's to replace.

    Args:
        epochs: a budget, where the recommended one does not suit.
    """
    return recipe(facts_of(store), epochs)


def recipe(facts: Facts, epochs: int | None = None) -> RunConfig:
    """Settings from sizes alone."""
    epochs = epochs or epochs_of(facts)
    once = facts.repeats < FEW_REPEATS
    return RunConfig(
        epochs=epochs,
        network=NetworkConfig(encoder=_encoder(facts)),
        loss=recommended_loss(facts.n_items, mask_seen=once),
        plan=PlanConfig(batch_users=batch_users_of(facts)),
        optimizer=_optimizer(facts, epochs),
        evaluation=EvaluationConfig(remove_seen=once),
        validation=ValidationConfig(every_epochs=max(1, epochs // VALIDATIONS), patience=VALIDATIONS // 4),
    )


def epochs_of(facts: Facts) -> int:
    """About a million windows, so that few users are visited often and many seldom."""
    return int(np.clip(1_000_000 // max(1, facts.n_users), 10, 160))


def batch_users_of(facts: Facts) -> int:
    """Larger steps where an epoch has many."""
    return 128 if facts.n_users < 20_000 else 512


def max_length_of(facts: Facts) -> int:
    """The shortest length that holds nine histories of ten; longer ones are seen through random windows."""
    return next((length for length in LENGTHS if length >= facts.long_history), LENGTHS[-1])


def _encoder(facts: Facts) -> EncoderConfig:
    width, blocks = (64, 2) if facts.n_events < 20_000 else (128, 2) if facts.n_events < 800_000 else (256, 4)
    return EncoderConfig(
        width=width,
        blocks=blocks,
        max_length=max_length_of(facts),
        dropout=0.5 if width > 64 else 0.2,  # width pays only with much dropout
        block=BlockConfig(heads=width // 32),
    )


def _optimizer(facts: Facts, epochs: int) -> OptimizerConfig:
    steps = epochs * max(1, -(-facts.n_users // batch_users_of(facts)))
    return OptimizerConfig(
        learning_rate=2e-3,
        warmup_steps=min(100, steps // 10),
        ema_decay=float(np.clip(1 - 20 / steps, 0.9, 0.999)),
    )
