"""Images cut into rows over the ranks of a mesh (nv.spatial_parallel). The code is in distributed/spatial/."""

from te_nvfp4_cv.distributed.spatial import SpatialTensor, from_piece, parallelize, shard, to_dtensor, whole

__all__ = ["SpatialTensor", "from_piece", "parallelize", "shard", "to_dtensor", "whole"]
