"""Requests about one image go to one replica, whose prefix cache then has the image's tokens.

Rendezvous hashing (Thaler and Ravishankar, 1998) ranks the replicas for every image: when a replica comes or
goes, only the images that it takes or had change their place. The load is bounded (Mirrokni et al., 2018): a
replica with more than ``LOAD_BOUND`` times the mean of the requests in flight is passed over.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

from ray.serve.request_router import (
    LocalityMixin,
    MultiplexMixin,
    PendingRequest,
    RequestRouter,
    RunningReplica,
)

LOAD_BOUND = 1.5


def image_key(body: Mapping[str, Any]) -> bytes | None:
    """Hash of the first image in the body of a chat request; None if there is no image."""
    for message in body.get("messages", ()):
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if part.get("type") == "image_url":
                return hashlib.blake2b(part["image_url"]["url"].encode(), digest_size=8).digest()
    return None


def rank_replicas(key: bytes, loads: Mapping[str, int]) -> list[str]:
    """Replicas in the order in which a request should try them.

    Args:
        key: of the image.
        loads: replica → requests in flight.

    Returns:
        All replicas by rendezvous hashing; those with too much load at the end.
    """
    most = math.ceil(LOAD_BOUND * (sum(loads.values()) + 1) / max(1, len(loads)))
    ranked = sorted(loads, key=lambda name: hashlib.blake2b(name.encode(), key=key, digest_size=8).digest())
    return sorted(ranked, key=lambda name: loads[name] + 1 > most)


class ImageAffinityRouter(LocalityMixin, MultiplexMixin, RequestRouter):
    """Routes by image; requests without an image go to the replica with the least load."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups of replicas, tried one after the other."""
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        loads = {
            name: self.replica_queue_len_cache.get(replica.replica_id) or 0
            for name, replica in by_name.items()
        }
        bodies = [item for item in pending_request.args if isinstance(item, dict)] if pending_request else []
        key = image_key(bodies[0]) if bodies else None
        if key is None:
            return [[replica] for _, replica in sorted(by_name.items(), key=lambda item: loads[item[0]])]
        return [[by_name[name]] for name in rank_replicas(key, loads)]
