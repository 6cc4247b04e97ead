"""The paper's analyses: pure functions of arrays.

Each measure tells how sure its definition is, as docs/concepts.md does: in the paper's words; believed, and not
verified against the publication; or ours.
"""
