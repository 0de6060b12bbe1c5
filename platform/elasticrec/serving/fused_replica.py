"""Arguments of the graph in; a replica of the topology `fused` out: HTTP, events and model in one process, no hop."""

from concurrent.futures import ThreadPoolExecutor

import torch

from elasticrec.artifact.bundle import open_bundle
from elasticrec.serving.arguments import Args
from elasticrec.serving.gateway import in_thread
from elasticrec.serving.gpu import device_of, require_healthy
from elasticrec.serving.http_replica import HttpReplica
from elasticrec.serving.meter import Meter
from elasticrec.serving.opening import answers_when_measured, checked_scorer, open_histories, open_keys
from elasticrec.serving.recommender import Recommender
from elasticrec.serving.stores import open_items
from elasticrec.serving.versions import Loaded


class FusedReplica(HttpReplica):
    """HTTP, events and model in one process: no hop."""

    def __init__(self, args: Args) -> None:
        self._device = device_of(args.num_gpus)
        torch.set_num_threads(args.threads)  # Ray's OMP_NUM_THREADS follows num_cpus, which may be a fraction
        keys, events, items = open_keys(args), open_histories(args), open_items(args.events)
        thread = ThreadPoolExecutor(1, thread_name_prefix="model")  # one for all versions: as many threads as CPUs

        def load(uri: str) -> Loaded:
            bundle, beside = open_bundle(uri), self._versions.answers
            scorer = checked_scorer(bundle, args, beside, thread)
            model = Recommender(bundle, events, scorer, items, args.how, beside=beside)
            recommend = in_thread(model.recommend, thread)
            return Loaded(model=model, recommend=recommend, reference=answers_when_measured(bundle))

        self._meter = Meter()
        self._serve(args, load, keys, events, items, meter=self._meter)

    def record_autoscaling_stats(self) -> dict[str, float]:
        return self._meter.stats()

    def check_health(self) -> None:
        require_healthy(self._device)
