"""The compressions of layers: from compressed pieces to plain ones.

Pure iterators: no trio, no supervisor. The worker runs them inside the TD, `acon` in its
own process. What they read is unverified.
"""

from __future__ import annotations

from plugins.image_store.inflate import gzip_members, zstd_frames
from plugins.image_store.inflate.damage import StreamDamaged
from plugins.image_store.inflate.gzip_members import gunzip
from plugins.image_store.inflate.zstd_frames import unzstd

# Bytes; no piece of either is longer.
STEP_BYTES = max(gzip_members.STEP_BYTES, zstd_frames.MAX_BLOCK_BYTES)

__all__ = ["STEP_BYTES", "StreamDamaged", "gunzip", "unzstd"]
