"""Names of the columns and files that every stage agrees on."""

from typing import Final

# Columns of interaction logs and tables, after the user's own names were mapped.
USER: Final = "user_id"
ITEM: Final = "item_id"
TIME: Final = "timestamp"  # int64, seconds since the epoch
RATING: Final = "rating"
EVENT: Final = "event_type"
TITLE: Final = "title"
CATEGORIES: Final = "categories"

# Dense indices. Users run from 0; items run from 1, most popular first, because 0 pads a sequence.
USER_INDEX: Final = "user_index"
ITEM_INDEX: Final = "item_index"
COUNT: Final = "count"
PAD: Final = 0
