"""What schemathesis makes of the OpenAPI document: requests that fit it and that do not, and what comes back."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import ignored_auth

from elasticrec.artifact.bundle import write_bundle
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.serving.auth import KeyRing, create_key
from elasticrec.serving.deadline import MAX_TIMEOUT_MS
from elasticrec.serving.events import SqliteConfig, SqliteEventStore
from elasticrec.serving.gateway import Service, create_app, in_thread
from elasticrec.serving.guard import Protection
from elasticrec.serving.items import SqliteItemStore
from elasticrec.serving.recommender import Recommender

N_ITEMS = 20


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    torch.manual_seed(0)
    index = np.arange(1, N_ITEMS + 1)
    items = pa.table(
        {
            "item_index": index,
            "item_id": [f"i{number}" for number in index],
            "title": [f"Item {number}" for number in index],
            "categories": [["drama"]] * N_ITEMS,
            "count": index[::-1],
        }
    )
    network = Network(NetworkConfig(encoder=EncoderConfig(width=8, blocks=1, max_length=6)), N_ITEMS)
    folder = tmp_path_factory.mktemp("openapi")
    key = create_key(folder / "keys.json", "shop", ("read", "events", "admin"))
    store = SqliteEventStore(SqliteConfig(path=folder / "events.sqlite"))
    changes = SqliteItemStore(Path(folder / "events.sqlite"))
    model = Recommender(write_bundle(folder / "bundle", network, items, name="t", version="1"), store, items=changes)
    with ThreadPoolExecutor(1) as thread, ThreadPoolExecutor(1) as event_thread:
        service = Service(
            model=model,
            recommend=in_thread(model.recommend, thread),
            events=store,
            items=changes,
            event_thread=event_thread,
        )
        patient = Protection(timeout_ms=MAX_TIMEOUT_MS)  # a machine may stand still for seconds: that is no 5xx of ours
        app = create_app(service, KeyRing(folder / "keys.json"), patient)
        document = schemathesis.openapi.from_asgi("/openapi.json", app)
        document.config.update(headers={"authorization": f"Bearer {key}"})
        yield document
    store.close()
    changes.close()


OPERATIONS = [
    ("/v1/recommend", "POST"),
    ("/v1/recommend:batch", "POST"),
    ("/v1/search", "GET"),
    ("/v1/events", "POST"),
    ("/v1/items/{item_id}/similar", "GET"),
    ("/v1/items/{item_id}", "GET"),
    ("/v1/items/{item_id}", "PUT"),
    ("/v1/items/{item_id}", "DELETE"),
    ("/v1/users/{user_id}", "GET"),
    ("/v1/users/{user_id}", "DELETE"),
    ("/v1/admin/replica", "GET"),
    ("/v1/admin/users", "GET"),
    ("/v1/admin/compare", "GET"),
    ("/v1/admin/versions", "GET"),
    ("/v1/admin/versions", "POST"),
    ("/healthz", "GET"),
    ("/readyz", "GET"),
]
NOTHING_WRONG = [
    ("/v1/items/{item_id}", "GET"),
    ("/v1/items/{item_id}", "DELETE"),
    ("/v1/admin/replica", "GET"),
    ("/v1/admin/versions", "GET"),
    ("/healthz", "GET"),
    ("/readyz", "GET"),
]


def test_every_operation_is_tried(document: Any) -> None:
    told = [(operation.ok().path, operation.ok().method.upper()) for operation in document.get_all_operations()]
    assert sorted(told) == sorted(OPERATIONS)


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_every_answer_is_one_that_the_document_tells_of(
    document: Any, path: str, method: str, mode: GenerationMode
) -> None:
    operation = document[path][method]
    if mode is GenerationMode.NEGATIVE and (path, method) in NOTHING_WRONG:
        pytest.skip("every request of this operation fits")

    @settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: schemathesis.Case) -> None:
        case.call_and_validate(excluded_checks=[ignored_auth])  # which test_serving_api tries

    run()
