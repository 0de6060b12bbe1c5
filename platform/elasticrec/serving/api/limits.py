"""How much a request may hold, and what some of its texts look like: the numbers that docs/serving.md names."""

from typing import Final

MAX_K: Final = 200
MAX_HISTORY: Final = 1_000
MAX_EXCLUDE: Final = 1_000
MAX_OFFSET: Final = 1_000
MAX_BOOSTS: Final = 100
MAX_FACTOR: Final = 1_000.0
MAX_BATCH_USERS: Final = 10_000
MAX_BATCH_ITEMS: Final = 200_000  # users times k
CURSOR: Final = "^[A-Za-z0-9_-]{16}$"
VERSION: Final = "^[A-Za-z0-9][A-Za-z0-9._-]*$"
MAX_QUERY_CHARACTERS: Final = 256
MAX_TITLE_CHARACTERS: Final = 1_000
MAX_ITEM_CATEGORIES: Final = 100
MAX_ITEM_ATTRIBUTES: Final = 50
MAX_VECTOR: Final = 8_192
MAX_ENTRY: Final = 1e6  # of a vector: its products stay finite in float32
MAX_EVENTS: Final = 1_000
MAX_ID_CHARACTERS: Final = 256
MAX_BODY_BYTES: Final = 1 << 20
MAX_TIMESTAMP_S: Final = 1 << 53  # integers that every JSON reader keeps exactly
