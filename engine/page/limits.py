"""What the page takes from anyone who reaches it, and no more."""

from __future__ import annotations

MAX_BODY = 32 * 2**20  # bytes of one request: pictures travel in base64
MAX_PIXELS = 2**25  # of a picture that is opened: 34 million
MAX_IMAGES = 16  # of one request
MAX_PAGE_SEED = 2**53 - 1 - MAX_IMAGES  # of the first picture: browsers know no larger whole numbers exactly
MAX_TEXT = 2000  # characters of a prompt
MAX_PHRASE = 200  # characters of what one box holds
MAX_EDIT_BOXES = 64  # boxes that are drawn anew
MAX_WAITING = 8  # requests for pictures beside the one that is drawn
MAX_CONNECTIONS = 64
IDLE_S = 30.0  # seconds that a connection may say nothing
