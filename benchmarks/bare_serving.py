"""What one would write without this project: FastAPI on uvicorn, torch, histories in memory; no keys, events, batches.

BUNDLE=… DATA=… python -m uvicorn benchmarks.bare_serving:app --workers 2
"""

import os

import torch
from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.answering import Answering

torch.set_num_threads(1)
app = FastAPI()
answering = Answering(os.environ["BUNDLE"], os.environ["DATA"])


class Ask(BaseModel):
    user_id: str
    k: int = 10


@app.post("/v1/recommend")
def recommend(ask: Ask) -> dict[str, object]:
    return {"items": answering.top([ask.user_id], ask.k)[0]}


@app.get("/readyz")
def readyz() -> str:
    return "ready"
