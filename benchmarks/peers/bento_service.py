"""The peer: BentoML with its adaptive batching; the same network and histories. BUNDLE=… DATA=… bentoml serve …"""

import os

import bentoml  # type: ignore[import-not-found]  # in the environment of the peers only
import torch
from pydantic import BaseModel

from benchmarks.answering import Answering

torch.set_num_threads(1)


class Ask(BaseModel):
    user_id: str
    k: int = 10


@bentoml.service(
    workers=int(os.environ.get("WORKERS", "2")),
    traffic={"timeout": 60, "max_concurrency": 1_000},
    logging={"access": {"enabled": False}},  # as ours and bare uvicorn run
)
class Recommender:
    def __init__(self) -> None:
        self._answering = Answering(os.environ["BUNDLE"], os.environ["DATA"])

    @bentoml.api(batchable=True, max_batch_size=64, max_latency_ms=1_000, route="/v1/recommend")  # type: ignore[untyped-decorator]
    def recommend(self, asks: list[Ask]) -> list[list[dict[str, object]]]:
        return self._answering.top([ask.user_id for ask in asks], max(ask.k for ask in asks))
