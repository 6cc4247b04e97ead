"""Bank and queries to votes."""

from leadline.knn.exact import MEMORY, NOTHING, Bank, Cost
from leadline.knn.votes import Neighbours, Votes, count_votes, knn_votes

__all__ = ["MEMORY", "NOTHING", "Bank", "Cost", "Neighbours", "Votes", "count_votes", "knn_votes"]
