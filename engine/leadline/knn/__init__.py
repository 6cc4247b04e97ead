"""Bank and queries to votes."""

from leadline.knn.exact import Bank, Cost
from leadline.knn.votes import Neighbours, Votes, count_votes, knn_votes

__all__ = ["Bank", "Cost", "Neighbours", "Votes", "count_votes", "knn_votes"]
