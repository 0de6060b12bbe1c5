"""Item ids in; what the catalogue knows of them and what is like them out. Items are put and withdrawn at run time."""

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from elasticrec.serving.api.items import ItemResponse, PutItem, SimilarResponse
from elasticrec.serving.api.limits import MAX_ID_CHARACTERS, MAX_K, MAX_OFFSET
from elasticrec.serving.api.problems import ItemNotFoundError, OtherVectorError, Problem, UnavailableError
from elasticrec.serving.assortment import View
from elasticrec.serving.caching import tagged
from elasticrec.serving.catalogue import Item
from elasticrec.serving.filters import CategoryFilter, Filters
from elasticrec.serving.history import Request
from elasticrec.serving.items import ItemStore, StoredItem
from elasticrec.serving.service import Ask, Service
from elasticrec.serving.timings import timings
from elasticrec.serving.whole_ids import take_whole_ids

ItemId = Annotated[str, Path(description="an item id, percent-encoded where it has other characters")]
KnownTag = Annotated[str | None, Header(alias="if-none-match", description="ETag of the answer that the client has")]
_NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "No such item, or withdrawn"}}
_PUT: dict[int | str, dict[str, Any]] = {
    201: {"model": ItemResponse, "description": "The item is new, or back"},
    409: {"model": Problem, "description": "The model reads vectors of another length, or none"},
}
_SAME: dict[int | str, dict[str, Any]] = {304: {"description": "As in the answer with the tag in If-None-Match"}}


def add_items(router: APIRouter, service: Service, ask: Ask) -> None:
    """`GET /items/{id}/similar`, and `GET`, `PUT` and `DELETE /items/{id}`."""
    take_whole_ids()

    @router.get(
        "/items/{item_id:path}/similar",
        response_model=SimilarResponse,
        responses=_NOT_FOUND | _SAME,
        summary="Items that are like one",
    )
    async def similar(
        item_id: ItemId,
        http: HttpRequest,
        if_none_match: KnownTag = None,  # noqa: ARG001 - documented here, read by `tagged`
        k: Annotated[int, Query(ge=1, le=MAX_K)] = 10,
        offset: Annotated[int, Query(ge=0, le=MAX_OFFSET)] = 0,
    ) -> Response:
        started_s = time.perf_counter()
        view = await _view(service)
        answer = await ask(_alike(item_id, view, k, offset))
        content = {
            "item_id": item_id,
            "items": [{"item_id": found, "title": title, "score": score} for found, title, score in answer.items],
            "source": answer.source,
            "model_version": answer.version or service.model.version,
        }
        return await tagged(http, content, timings(started_s, answer.timings_ms))

    @router.get(
        "/items/{item_id:path}",
        response_model=ItemResponse,
        responses=_NOT_FOUND | _SAME,
        summary="What the catalogue knows of an item",
    )
    async def get_item(item_id: ItemId, http: HttpRequest, if_none_match: KnownTag = None) -> Response:  # noqa: ARG001
        started_s = time.perf_counter()
        found = (await _view(service)).find(item_id)
        if found is None:
            raise ItemNotFoundError("the catalogue has no item with this id, or it was withdrawn")
        return await tagged(http, _content(found, service), timings(started_s, {}))

    @router.put(
        "/items/{item_id:path}",
        response_model=ItemResponse,
        responses=_PUT,
        summary="Add an item, or change what is known of it",
    )
    async def put_item(item_id: Annotated[str, Path(max_length=MAX_ID_CHARACTERS)], body: PutItem) -> Response:
        started_s = time.perf_counter()
        store = _store(service)
        _require_fit(body, service)
        known = item_id in await _view(service)
        await asyncio.to_thread(store.put, _stored(item_id, body))
        found = (await _view(service)).find(item_id)
        if found is None:  # withdrawn by somebody else in the meantime
            raise ItemNotFoundError("the item was withdrawn while it was put")
        response = ItemResponse(**_content(found, service), timings_ms=timings(started_s, {}))
        return Response(response.model_dump_json(), 200 if known else 201, media_type="application/json")

    @router.delete(
        "/items/{item_id:path}",
        status_code=204,
        response_class=Response,
        responses=_NOT_FOUND,
        summary="Withdraw an item: no answer has it from now on",
    )
    async def withdraw_item(item_id: ItemId) -> Response:
        store = _store(service)
        if (await _view(service)).index(item_id) is None:
            raise ItemNotFoundError("the catalogue has no item with this id")
        await asyncio.to_thread(store.withdraw, item_id)
        return Response(status_code=204)


def _alike(item_id: str, view: View, k: int, offset: int) -> Request:
    item = view.find(item_id)
    if item is None:
        raise ItemNotFoundError("the catalogue has no item with this id, or it was withdrawn")
    if view.embedded(view.index(item_id) or 0):
        return Request(k=k, offset=offset, like=item_id)
    filters = Filters(categories=CategoryFilter(any=list(item.categories)))
    return Request(k=k, offset=offset, exclude=(item_id,), filters=filters)


async def _view(service: Service) -> View:
    return await asyncio.to_thread(service.model.assortment.view)  # it may ask another host


def _store(service: Service) -> ItemStore:
    if service.items is None:
        raise UnavailableError("this service keeps no items; its catalogue is that of the model")
    return service.items


def _require_fit(body: PutItem, service: Service) -> None:
    width, version = service.model.assortment.vector_width, service.model.version
    if body.vector is None or len(body.vector) == width:
        return
    wanted = f"one of {width} entries" if width else "none: it has no content tower that was fitted with vectors"
    raise OtherVectorError(f"vector has {len(body.vector)} entries; model '{version}' reads {wanted}")


def _stored(item_id: str, body: PutItem) -> StoredItem:
    return StoredItem(
        item_id=item_id,
        title=body.title,
        categories=tuple(dict.fromkeys(body.categories)),
        attributes=body.attributes,
        published_s=body.published,
        count=body.interactions,
        vector=None if body.vector is None else tuple(body.vector),
    )


def _content(item: Item, service: Service) -> dict[str, Any]:
    return {
        "item_id": item.item_id,
        "title": item.title,
        "categories": list(item.categories),
        "attributes": dict(item.attributes),
        "interactions": item.count,
        "model_version": service.model.version,
    }
