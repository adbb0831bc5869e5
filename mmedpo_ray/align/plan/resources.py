"""The resources that the workers of `align` need, and whether the cluster has them."""

from __future__ import annotations

from mmedpo_ray.align.settings import AlignConfig
from mmedpo_ray.compat import cluster
from mmedpo_ray.errors import UserError


def wants_gpu(align: AlignConfig) -> bool:
    """Whether every worker gets a GPU."""
    return cluster.has_gpu() if align.use_gpu is None else align.use_gpu


def rank_resources(align: AlignConfig, *, use_gpu: bool) -> dict[str, float]:
    """Resources of a worker, by Ray's names."""
    return {"CPU": align.cpus_per_worker} | ({"GPU": 1.0} if use_gpu else {})


def check_cluster(align: AlignConfig, *, use_gpu: bool) -> None:
    """Fails at once if Ray would wait for resources for ever (an autoscaling cluster may still grow).

    Raises:
        UserError: there is no GPU, or no room for the fewest ranks.
    """
    if align.attention == "flex" and not use_gpu:
        raise UserError(
            "align.attention=flex needs a GPU for every worker, and training here has none (align.use_gpu, "
            "or a cluster without GPUs). Set align.attention=tree, which gives equal values."
        )
    if use_gpu and align.use_gpu and not cluster.has_gpu() and not cluster.may_grow():
        raise UserError("align.use_gpu is true but the cluster has no GPU. Set it to null or false.")
    resources = rank_resources(align, use_gpu=use_gpu)
    room = cluster.room_for(resources)
    if room >= align.min_workers or cluster.may_grow():
        return
    one = " and ".join(f"{amount:g} {name}" for name, amount in resources.items())
    raise UserError(
        f"align.num_workers asks for at least {align.min_workers} ranks of {one} each "
        f"(align.cpus_per_worker), but the nodes of the cluster hold {room}. Lower one of them, or add nodes "
        "(a local cluster: raise ray.local_cpus)."
    )
