"""What `serve run` (as text) or `serve deploy` (as YAML) gives in; the typed arguments of the graph out."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from elasticrec.artifact.location import locate
from elasticrec.artifact.registry import parse_reference
from elasticrec.serving.prior import PriorConfig
from elasticrec.serving.setup import StagesConfig
from elasticrec.serving.stores import absolute


def _parsed(value: Any) -> Any:
    """`serve run` gives text: JSON, or nothing."""
    return json.loads(value or "{}") if isinstance(value, str) else value


def _whole_or_less_than_one(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise ValueError(f"{gpus:g} GPUs: give a share below 1, or a whole number")
    return gpus


OptionalPath = Annotated[Path | None, BeforeValidator(lambda value: None if value == "" else value)]


class Args(BaseModel):
    """What `serve run` (as text) and `serve deploy` (as YAML) may give; paths start where the builder runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: str = Field(description="folder or URI of a bundle, or REGISTRY#NAME@LABEL")
    topology: Literal["fused", "split"] = "fused"
    replicas: int = Field(default=1, ge=1, le=1_000, description="replicas that hold the model")
    gateways: int = Field(default=1, ge=1, le=1_000, description="replicas that speak HTTP (split only)")
    events: str = Field(default="runs/serving/events.sqlite", description="SQLite file on a local disk, or redis://…")
    seed: OptionalPath = Field(default=None, description="prepared data set whose events known users start with")
    keys: OptionalPath = Field(default=None, description="key file; without one only loopback addresses are served")
    stages: Annotated[dict[str, str], BeforeValidator(_parsed)] = Field(
        default={}, description='classes in place of ours, {"rank": "shop.mine:Ranker"}'
    )
    remove_seen: bool | None = Field(default=None, description="left out: as the bundle was trained and measured")
    debias: float = Field(default=0.0, ge=0, le=2, description="how much of popularity is taken out of the odds")
    freshness: float = Field(default=0.0, ge=0, le=20, description="added to the score of a brand-new item")
    half_life_days: float = Field(default=14.0, gt=0, description="after which half of the freshness is left")
    search_taste: float = Field(default=0.3, ge=0, le=1, description="what taste counts beside the text of a search")
    threads: int = Field(default=1, ge=1, le=256, description="threads of torch in each model replica")
    num_cpus: float = Field(default=1.0, ge=0, description="CPUs that Ray reserves for a model replica")
    num_gpus: Annotated[float, AfterValidator(_whole_or_less_than_one)] = Field(
        default=0.0,
        ge=0,
        le=64,
        description="share of a GPU for a model replica, 0.25; 2: a catalogue over two; 0: none",
    )
    gateway_cpus: float = Field(default=1.0, ge=0, description="CPUs that Ray reserves for a gateway (split only)")
    label_selector: Annotated[dict[str, str], BeforeValidator(_parsed)] = Field(
        default={}, description='labels of nodes that replicas may lie on, {"kind": "gateway"}; empty: any node'
    )
    max_replicas: int | None = Field(default=None, ge=1, description="model replicas grow to so many with their load")
    min_replicas: int = Field(default=1, ge=0, description="and shrink to so many; 0: none while nobody asks")
    target_latency_ms: float = Field(default=100.0, gt=0, description="95th percentile above which replicas are added")
    target_waiting: float = Field(default=32.0, gt=0, description="requests behind the running batch of a replica")
    upscale_delay_s: float = Field(default=5.0, ge=0)
    downscale_delay_s: float = Field(default=120.0, ge=0)
    max_batch: int = Field(default=64, ge=1, le=1_024)
    bulk_users: int = Field(
        default=64, ge=1, le=1_024, description="users of a batch request that go through the model together"
    )
    max_latency_ms: float = Field(default=250.0, gt=0, description="a version that takes longer alone is refused")
    max_ongoing_requests: int = Field(default=512, ge=1, description="a replica works on at most so many at once")
    max_queued_requests: int = Field(default=512, ge=-1, description="before Serve refuses by itself; -1: no limit")
    timeout_ms: float = Field(default=2_000.0, gt=0, le=60_000, description="for callers that name none")
    rate: str = Field(default="", description="what each key may use, as '100/second'; empty: no limit")
    rate_store: str = Field(default="", description="redis://… counts for all replicas; empty: each for itself")
    audit: OptionalPath = Field(default=None, description="file of administrative calls; else the log elasticrec.audit")

    @property
    def how(self) -> StagesConfig:
        """How answers are made."""
        prior = PriorConfig(debias=self.debias, freshness=self.freshness, half_life_days=self.half_life_days)
        return StagesConfig(classes=self.stages, remove_seen=self.remove_seen, prior=prior)

    @property
    def most_replicas(self) -> int:
        """Replicas that hold the model, when there are most of them."""
        return max(self.replicas, self.max_replicas or 0)

    @property
    def http_replicas(self) -> int:
        """Replicas that speak HTTP and read events, when there are most of them."""
        return self.most_replicas if self.topology == "fused" else self.gateways

    @property
    def http_cpus(self) -> float:
        """CPUs that each of those reserves."""
        return self.num_cpus if self.topology == "fused" else self.gateway_cpus

    def placed(self) -> "Args":
        """The same with absolute paths: replicas run in other folders."""
        return self.model_copy(
            update={
                "bundle": _absolute(self.bundle),
                "events": absolute(self.events),
                "seed": None if self.seed is None else self.seed.absolute(),
                "keys": None if self.keys is None else self.keys.absolute(),
                "audit": None if self.audit is None else self.audit.absolute(),
            }
        )


def _absolute(bundle: str) -> str:
    parsed = parse_reference(bundle)
    return bundle if parsed is None else f"{locate(parsed.root).uri}#{parsed.name}@{parsed.ref}"
