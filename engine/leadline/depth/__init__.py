"""Votes to depths to the ensemble's columns: pure functions of arrays."""

from leadline.depth.depths import depth_from_votes, is_unsettled
from leadline.depth.ensemble import MemberDepths, combine

__all__ = ["MemberDepths", "combine", "depth_from_votes", "is_unsettled"]
