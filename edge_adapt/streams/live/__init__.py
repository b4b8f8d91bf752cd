"""Frames as they come: archives played back, watched folders, cameras, video files, and images handed in."""

from edge_adapt.streams.live.factory import open_source
from edge_adapt.streams.live.protocol import BrokenFrameError, Frame, FrameSource, SourceEnded, SourceLostError
from edge_adapt.streams.live.pushed import PushedSource

__all__ = ["BrokenFrameError", "Frame", "FrameSource", "PushedSource", "SourceEnded", "SourceLostError", "open_source"]
