"""Bank and queries to votes."""

from leadline.knn.exact import Cost, search
from leadline.knn.votes import Votes, count_votes, knn_votes

__all__ = ["Cost", "Votes", "count_votes", "knn_votes", "search"]
