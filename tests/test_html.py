"""What a notebook shows."""

from html.parser import HTMLParser

import numpy as np

import leadline
from leadline.html import html_table
from leadline.study.ensembles import read_ensembles
from leadline.study.relations import mean_over_members


def cells(text):
    """The texts of a table's cells, a list for each row, read by a parser."""

    class Reader(HTMLParser):
        rows, row = [], None

        def handle_starttag(self, tag, attributes):
            if tag == "tr":
                self.rows = [*self.rows, []]
            if tag in ("td", "th"):
                self.rows[-1].append("")
            assert tag in ("table", "thead", "tbody", "tr", "th", "td", "p") and not attributes

        def handle_data(self, data):
            if self.rows and self.rows[-1]:
                self.rows[-1][-1] += data

    reader = Reader()
    reader.feed(text)
    return reader.rows


def test_values_are_text():
    found = html_table({"a": ["<b>1</b>", None], "b & c": [0.123456, 7]})
    assert cells(found) == [["a", "b & c"], ["<b>1</b>", "0.1235"], ["", "7"]]


def test_long_tables_say_what_they_leave_out():
    found = html_table({"a": range(1000)})
    assert len(cells(found)) == 21 and "1,000 rows, of which the first 20 are shown" in found
    assert "are shown" not in html_table({"a": range(20)})


def test_votes():
    random = np.random.default_rng(0)
    votes = leadline.knn_votes(random.normal(size=(50, 3)), np.arange(50) % 4, random.normal(size=(3, 3)), k=5)
    rows = cells(votes._repr_html_())
    assert rows[0] == ["winner", "winner_votes", "runner_up", "runner_up_votes"]
    assert [row[0] for row in rows[1:]] == [str(winner) for winner in votes.winner]


def test_a_run_and_its_ensembles(studied_run):
    rows = cells(studied_run._repr_html_())
    assert ["run", "studied"] in rows and ["configuration", studied_run.manifest["fingerprint"]] in rows
    assert sum(row[0].startswith("mlp") for row in rows) == 12
    ensemble = read_ensembles(studied_run)[0]
    table = cells(ensemble._repr_html_())
    for row, inside, depth, right in zip(
        table[1:], ensemble.held_out, ensemble.depth, ensemble.prediction == ensemble.labels, strict=True
    ):
        assert row[3:] == [f"{right[inside].mean():.4g}", f"{depth[inside].mean():.4g}"]
    estimate = cells(mean_over_members(np.arange(8.0).reshape(4, 2))._repr_html_())
    assert [row[0] for row in estimate] == ["value", "3", "4"]
