"""The explorer: a local page over a stored run.

`data` asks the run's tables, `images` reads the points themselves, `server` answers the page that lies in `static`.
"""
