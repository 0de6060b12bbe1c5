"""Arguments of the graph and a handle of model replicas in; a gateway of the topology `split` out."""

import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from elasticrec.artifact.bundle import open_bundle
from elasticrec.serving.api.problems import UnavailableError
from elasticrec.serving.arguments import Args
from elasticrec.serving.deadline import left_s
from elasticrec.serving.http_replica import HttpReplica
from elasticrec.serving.meter import Meter
from elasticrec.serving.opening import answers_when_measured, open_histories, open_keys
from elasticrec.serving.options import BATCHES_PER_MODEL
from elasticrec.serving.question import Candidates, Question
from elasticrec.serving.recommender import SplitRecommender
from elasticrec.serving.stores import open_items
from elasticrec.serving.versions import Loaded

_LOGGER: Final = logging.getLogger("ray.serve")


class GatewayReplica(HttpReplica):
    """HTTP and events; gathers a batch before the one hop to a model replica."""

    def __init__(self, args: Args, model: DeploymentHandle[Any]) -> None:
        self._model, self._meter = model, Meter()
        keys, events, items = open_keys(args), open_histories(args), open_items(args.events)
        thread = ThreadPoolExecutor(1, thread_name_prefix="history")

        def load(uri: str) -> Loaded:
            bundle, score, beside = open_bundle(uri), partial(self._score, uri), self._versions.answers
            split = SplitRecommender(bundle, events, score, thread, items, args.how, beside=beside)
            return Loaded(model=split, recommend=split.recommend, reference=answers_when_measured(bundle))

        in_flight = BATCHES_PER_MODEL * args.most_replicas
        self._serve(args, load, keys, events, items, batches_in_flight=in_flight, meter=self._meter)

    async def _score(self, uri: str, question: Question) -> Candidates:
        try:
            refused = self._meter.untold()  # the model's replicas are those that grow
            candidates: Candidates = await self._model.score.remote(uri, question, left_s(), refused)
        except (RayError, RayServeException) as error:
            _LOGGER.error("the model did not answer: %s", error)
            raise UnavailableError("the model does not answer; try again") from error
        return candidates
