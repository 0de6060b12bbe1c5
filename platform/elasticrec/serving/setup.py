"""What stages are made from, and import paths of stages in; the classes of a graph out.

A stage is a plain class: its constructor takes a setup, its one method does the work.
`stages: {rank: "shop.mine:Ranker"}` puts another class in the place of ours.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from elasticrec.artifact.encoder_file import EncoderFile
from elasticrec.errors import ConfigError, suggestion
from elasticrec.model.network import AnyEncoder, Network
from elasticrec.serving.assortment import Assortment
from elasticrec.serving.events import EventStore
from elasticrec.serving.gpu import Resident
from elasticrec.serving.prior import Prior, PriorConfig

STAGES: Final = {  # name: (our class, its method)
    "history": ("elasticrec.serving.history:Histories", "prepare"),
    "encode": ("elasticrec.serving.encoding:Encoding", "encode"),
    "retrieve": ("elasticrec.serving.retrieval:ExactRetriever", "retrieve"),
    "rank": ("elasticrec.serving.ranking:Ranker", "rank"),
    "postprocess": ("elasticrec.serving.postprocess:Postprocess", "finish"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class StagesConfig:
    """How answers are made: classes in place of ours, what is returned again, what is added to scores."""

    classes: Mapping[str, str] = field(default_factory=dict)  # stage: "module:Class"
    remove_seen: bool | None = None  # none: as the bundle was trained and measured
    prior: PriorConfig = field(default_factory=PriorConfig)

    @property
    def own_scores(self) -> bool:
        """Whether scores are what the network gives: nothing is added, no stage is somebody else's."""
        return not self.classes and not self.prior.matters

    def __post_init__(self) -> None:
        for stage in self.classes:
            if stage not in STAGES:
                raise ConfigError(f"there is no stage '{stage}'{suggestion(stage, STAGES)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSetup:
    """For the stages beside the network: encode, retrieve, rank. Tensors lie where the network does."""

    network: Network
    prior: Prior | None = None
    resident: Resident | None = None  # on a GPU: what answers quickly there
    graph: EncoderFile | None = None  # on a CPU: what answers small batches quickly there


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewaySetup:
    """For the stages beside the event store: history, postprocess."""

    assortment: Assortment
    events: EventStore
    encoder: AnyEncoder  # how many events the network takes, and what it reads of each
    cosine: bool = True  # whether the length of an item's vector counts for nothing
    remove_seen: bool = True
    prior: Prior | None = None


def find_stage(config: StagesConfig, stage: str) -> Any:
    """The class of a stage.

    Raises:
        ConfigError: its import path is wrong, or what it names is no stage.
    """
    ours, method = STAGES[stage]
    path = config.classes.get(stage, ours)
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ConfigError(f"stages.{stage} is '{path}'; give 'module:Class'")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except ImportError as error:
        raise ConfigError(
            f"stages.{stage} is '{path}', and '{module_name}' cannot be imported: {error}; "
            "it must lie on the PYTHONPATH of every node"
        ) from None
    except AttributeError:
        known = (key for key, value in vars(importlib.import_module(module_name)).items() if isinstance(value, type))
        raise ConfigError(
            f"stages.{stage} is '{path}', and '{module_name}' has no '{name}'{suggestion(name, known)}"
        ) from None
    if not isinstance(found, type) or not callable(getattr(found, method, None)):
        raise ConfigError(f"stages.{stage} is '{path}', which is no class with a method '{method}'")
    return found


def check_stages(config: StagesConfig) -> None:
    """Raises ConfigError that names the first import path which is wrong."""
    for stage in STAGES:
        find_stage(config, stage)
