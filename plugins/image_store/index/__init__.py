"""An EROFS index over a layer's tar: the tree's inodes and names, while bytes stay in the tar."""

from plugins.image_store.index.plan import IndexPlan, plan_index

__all__ = ["IndexPlan", "plan_index"]
