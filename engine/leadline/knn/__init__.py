"""Bank and queries to votes."""

from leadline.knn.exact import MEMORY, NOTHING, Bank, Cost
from leadline.knn.indexes import Index, build_index, load_index, usable_method
from leadline.knn.methods import Method, parse_method
from leadline.knn.on_device import DeviceBank
from leadline.knn.on_devices import Devices, ExactBank, SharedBank, bank_on, devices_of
from leadline.knn.rank import merged
from leadline.knn.votes import Neighbours, Votes, count_votes, knn_votes

__all__ = [
    "MEMORY",
    "NOTHING",
    "Bank",
    "Cost",
    "DeviceBank",
    "Devices",
    "ExactBank",
    "Index",
    "Method",
    "Neighbours",
    "SharedBank",
    "Votes",
    "bank_on",
    "build_index",
    "count_votes",
    "devices_of",
    "knn_votes",
    "load_index",
    "merged",
    "parse_method",
    "usable_method",
]
