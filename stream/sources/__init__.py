"""Frames from files, folders of images, pipes and live sources.

No decoder is imported before it is needed. `stream.sources.live.Live` tells more of a live source
than a `Source` can.
"""

from .base import DecodeReport, Source, SourceInfo, open_source
from .sampling import Fps, Sampling, Uniform

__all__ = ["DecodeReport", "Fps", "Sampling", "Source", "SourceInfo", "Uniform", "open_source"]
