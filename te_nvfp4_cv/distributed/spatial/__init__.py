"""Images larger than one device: each rank of a mesh has some of their rows (nv.spatial_parallel).

mesh = torch.distributed.init_device_mesh("cuda", (4,))
with nv.nvfp4_autocast(recipe):
    scores = model(nv.spatial_parallel.shard(images, mesh))      # an unmodified model
    loss = F.cross_entropy(scores, nv.spatial_parallel.shard(labels, mesh, dim=1))
loss.backward()                                                   # gradients are whole on every rank
"""

from te_nvfp4_cv.distributed.spatial import layers, noise, norms, reductions, resample, shapes, windows  # noqa: F401
from te_nvfp4_cv.distributed.spatial.api import from_piece, parallelize, shard, to_dtensor, whole
from te_nvfp4_cv.distributed.spatial.tensor import SpatialTensor

__all__ = ["SpatialTensor", "from_piece", "parallelize", "shard", "to_dtensor", "whole"]
