"""Frames from files, folders of images and pipes. No decoder is imported before it is needed."""

from .base import DecodeReport, Source, SourceInfo, open_source
from .sampling import Fps, Sampling, Uniform

__all__ = ["DecodeReport", "Fps", "Sampling", "Source", "SourceInfo", "Uniform", "open_source"]
