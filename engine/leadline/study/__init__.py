"""The paper's analyses: measures as pure functions of arrays, and what makes tables of them from a stored run.

Each measure tells how sure its definition is, as docs/concepts.md does: in the paper's words; believed, and not
verified against the publication; or ours.
"""
