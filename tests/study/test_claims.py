"""Claims held against tables whose answer is known, and against those of a real study."""

import pyarrow as pa
import pytest

from leadline.study.analyses import ANALYSES
from leadline.study.claims import claims


def row(value, reach=0.01, **about):
    ends = {"low": None, "high": None} if reach is None else {"low": value - reach, "high": value + reach}
    return {"architecture": "net", **about, "value": value, **ends, "n": 100}


def judged(**tables):
    """{what was measured: (value, low, high, verdict)}"""
    found = claims({name: pa.Table.from_pylist(rows) for name, rows in tables.items()})
    return {
        one["measured"]: (one["value"], one["low"], one["high"], one["verdict"])
        for one in (found.to_pylist() if found else [])
    }


@pytest.mark.parametrize(
    ("measure", "value", "reach", "verdict"),
    [
        ("accuracy", -0.4, 0.1, "holds"),
        ("accuracy", 0.4, 0.1, "does not hold"),
        ("accuracy", -0.4, 0.5, "open"),
        ("accuracy", -0.4, None, "open"),
        ("entropy", 0.4, 0.1, "holds"),
        ("entropy", -0.4, 0.1, "does not hold"),
        ("adversarial input margin", -0.2, 0.1, "holds"),
        ("consensus-consistency", -0.2, 0.1, "holds"),
        ("output margin", 0.2, 0.1, "does not hold"),
        ("confidence", 0.2, 0.3, "open"),
    ],
)
def test_relations_are_judged_by_their_sign_and_interval(measure, value, reach, verdict):
    held_out = row(value, reach, measure=measure, split="held out")
    in_training = row(-value, reach, measure=measure, split="training")
    found = judged(rank_correlations=[held_out, in_training])
    assert [one[3] for one in found.values()] == [verdict]
    assert next(iter(found)) == f"rank correlation of held-out depth with {measure}"


def test_learning_is_judged_in_both_splits():
    rows = [row(0.5, measure="iteration learned", split=split) for split in ("training", "held out")]
    assert [one[3] for one in judged(rank_correlations=rows).values()] == ["holds", "holds"]


def probe_rows(points, against, split, values):
    about = {"points": points, "against": against, "split": split}
    return [row(value, **about, probe=p, name=f"layer {p}") for p, value in enumerate(values)]


def test_layers():
    rows = [
        *probe_rows("label uncorrupted", "given label", "training", [0.6, 0.7, 0.95]),
        *probe_rows("label uncorrupted", "given label", "held out", [0.55, 0.7, 0.8]),
        *probe_rows("label corrupted", "clean label", "training", [0.5, 0.7, 0.2]),
        *probe_rows("label corrupted", "given label", "training", [0.1, 0.2, 0.75]),
    ]
    found = judged(probe_accuracy=rows)
    expected = {
        "votes for the given label, training less held out: at the softmax, less at the input": (0.1, 0.06, 0.14),
        "corrupted training points, votes for the clean label: first layer, less softmax": (0.5, 0.48, 0.52),
        "corrupted training points, votes for the given label: softmax, less first layer": (0.55, 0.53, 0.57),
    }
    assert {what: one[:3] for what, one in found.items()} == {
        what: pytest.approx(one) for what, one in expected.items()
    }
    assert {one[3] for one in found.values()} == {"holds"}


def test_convergence_kinds_and_architectures():
    steps = [row(step, probe=p, name=f"layer {p}") for p, step in enumerate([0, 10, 50, 900])]
    kinds = [
        row(value, kind=kind, split="training", probe=p, name=f"layer {p}")
        for kind, values in {
            "ambiguous unless the label is given": [0.5, 0.8, 0.9],
            "looks like a different class": [0.1, 0.2, 0.9],
        }.items()
        for p, value in enumerate(values)
    ]
    between = [row(-0.3, other="plain", split="held out")]
    found = judged(step_of_convergence=steps, kinds_by_layer=kinds, between_architectures=between)
    assert found["step of convergence: layer 3, less layer 1"] == (
        890,
        pytest.approx(889.98),
        pytest.approx(890.02),
        "holds",
    )
    (middle,) = (one for what, one in found.items() if "probe 1" in what)
    assert middle == (pytest.approx(0.6), pytest.approx(0.58), pytest.approx(0.62), "holds")
    assert found["rank correlation of depth, held out, with that in plain"][3] == "does not hold"


def test_scores_and_accuracies():
    scores = [
        row(value, score=score, measure=measure)
        for measure in ("average precision", "precision = recall")
        for score, value in {"depth in training": 0.7, "1 - self-confidence (cleanlab)": 0.8}.items()
    ]
    early = [row(0.02, what="members, gain"), row(0.9, what="members, plain"), row(0.005, what="ensemble, gain")]
    again = [row(-0.02, what="ensemble, gain", run="mine-drop")]
    rejection = [row(-0.05, ordered_by="depth less entropy"), row(0.1, ordered_by="depth held out")]
    found = judged(corrupted_labels=scores, early_read_out=early, trained_again=again, rejection=rejection)
    assert {what: one[3] for what, one in found.items()} == {
        "average precision of finding corrupted labels: depth in training, less 1 - self-confidence (cleanlab)": (
            "does not hold"
        ),
        "accuracy gained by early read-out, members": "holds",
        "accuracy gained by early read-out, ensemble": "open",
        "accuracy gained by trained again (mine-drop), ensemble": "does not hold",
        "area under the risk-coverage curve: depth less entropy": "holds",
    }  # fmt: skip


def test_nothing_is_claimed_of_what_is_not_known():
    missing = {**row(0.0, None, measure="accuracy", split="held out"), "value": None}
    assert (
        claims({}) is None
        and judged(rank_correlations=[missing, row(-1.0, 0.1, measure="aum", split="held out")]) == {}
    )


def test_a_real_study_is_judged_by_its_own_tables(material):
    tables = {**ANALYSES["layers"](material), **ANALYSES["convergence"](material), **ANALYSES["corruption"](material)}
    found = claims(tables).to_pylist()
    assert {one["claim"] for one in found} == {
        "Later layers memorise",
        "Early layers generalise where later ones memorise wrong labels",
        "Early layers converge first",
        "Depth finds corrupted labels better than other scores",
    }
    steps = {one["probe"]: one["value"] for one in tables["step_of_convergence"].to_pylist()}
    (converged,) = (one for one in found if one["measured"].startswith("step of convergence"))
    assert converged["value"] == pytest.approx(steps[3] - steps[1])
