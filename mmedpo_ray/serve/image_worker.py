"""A process that decodes images: ``python -m mmedpo_ray.serve.image_worker FD PIXELS BYTES``.

Decoders of rare formats are large libraries in C. Here they cannot take the endpoint down with them, and one
that takes too long is ended from outside. The arguments are a socket's file descriptor and the limits of
:func:`mmedpo_ray.io.images.decode`. For each image that comes, two messages go back: JSON with the media
type or the reason, and the picture as :func:`mmedpo_ray.io.plain_images.plain_file` gives it.
"""

from __future__ import annotations

import json
import resource
import sys
from multiprocessing.connection import Connection

from mmedpo_ray.io.image_error import ImageError
from mmedpo_ray.io.plain_images import plain_file

# Virtual memory, most of it reserved by libraries and never used.
_MOST_MEMORY = 8 * 2**30


def main() -> int:
    """Answers until the other side closes."""
    descriptor, max_pixels, max_bytes = map(int, sys.argv[1:4])
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    with Connection(descriptor) as pipe:
        while True:
            try:
                data = pipe.recv_bytes()
            except EOFError:
                return 0
            head, picture = _decode(data, max_pixels, max_bytes)
            pipe.send_bytes(json.dumps(head).encode())
            pipe.send_bytes(picture)


def _decode(data: bytes, max_pixels: int, max_bytes: int) -> tuple[dict[str, str], bytes]:
    try:
        picture, kind = plain_file(data, "the image", max_pixels, max_bytes=max_bytes)
    except ImageError as error:
        return {"reason": error.reason, "detail": error.detail}, b""
    except MemoryError:
        return {"reason": "image_too_large", "detail": "the image: more memory than a decoder gets"}, b""
    return {"kind": kind}, picture


if __name__ == "__main__":
    sys.exit(main())
