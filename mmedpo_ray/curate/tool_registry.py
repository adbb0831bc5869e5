"""The visual tools: what finds the lesion in an image.

A new tool is a file with a :class:`~mmedpo_ray.curate.visual.tools.base.VisualTool` and a line here, or an entry point
of another package. A tool's module is imported when the tool is looked up, so a run imports the libraries of its tool
only.
"""

from mmedpo_ray.plugins import Registry

TOOLS = Registry(
    "visual tool",
    "mmedpo_ray.tools",
    {
        "dataset_mask": "mmedpo_ray.curate.visual.tools.dataset_mask:DatasetMask",
        "self_attention": "mmedpo_ray.curate.visual.tools.self_attention:SelfAttention",
        "medklip": "mmedpo_ray.curate.visual.tools.medklip:Medklip",
        "text_prompted": "mmedpo_ray.curate.visual.tools.text_prompted:TextPrompted",
    },
)
