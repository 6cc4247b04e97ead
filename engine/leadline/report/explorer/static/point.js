// One point: its picture, its scores, the trail of its votes, how it was learned, its neighbours.

import { drawLearning } from "./charts.js";
import { $, ask, count, element, figure, options, picture, say } from "./page.js";

const SHOWN = "point";

export async function showPoint(run, architecture, id) {
  const dialog = $("point");
  try {
    const point = await ask(`points/${id}?${new URLSearchParams({ architecture: architecture.name })}`, SHOWN);
    const learning = element("div", { className: "chart" });
    dialog.replaceChildren(
      element("div", { className: "bar" },
        element("h2", { id: "point-title" }, `${point.key}, point ${id}`),
        element("button", { type: "button", onclick: () => dialog.close() }, "Close")),
      element("div", { className: "head" }, picture(run.data, id, "large", point.key), scores(run, point)),
      element("h3", {}, "Votes through the probes"),
      element("p", { className: "hint" }, `In each member, the class that most of the ${run.k} nearest points of its `
        + "training split have at each probe, and how many have it. Blue is the label, orange another class."),
      trail(run, architecture, point),
      ...(point.learning.length ? [element("h3", {}, "Along training"), learning] : []),
      element("h3", {}, "Neighbours"),
      neighbours(run, architecture, point),
    );
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
    if (point.learning.length) await drawLearning(learning, point.learning);
  } catch (error) {
    say(error);
  }
}

// Of the members that hold the point out; one alone always agrees with itself.
const share = (consistency) => (consistency === null ? "" : `, of ${figure(100 * consistency, 0)} % of the members`);

function scores(run, point) {
  const depth = (mean, deviation, members) =>
    members === 0 ? "no member" : `${figure(mean)}${deviation === null ? "" : ` ± ${figure(deviation)}`}, ${count(members, "member")}`;
  const rows = [
    ["Label", run.className(point.label)],
    ["Clean label", point.clean_label === null ? null : run.className(point.clean_label)],
    ["Consensus", point.n_held_out === 0 ? "no member holds it out"
      : `${run.className(point.consensus_class)}${share(point.consensus_consistency)}`],
    ["Kind", run.kindName(point.kind)],
    ["Part", point.part],
    ["Depth held out", depth(point.mean_depth_held_out, point.std_depth_held_out, point.n_held_out)],
    ["Depth in training", depth(point.mean_depth_training, point.std_depth_training, point.n_training)],
    ["Accuracy held out", figure(point.held_out_accuracy)],
    ["Entropy held out", figure(point.mean_entropy_held_out, 3)],
  ];
  return element("dl", {}, ...rows.filter(([, said]) => said !== null)
    .flatMap(([name, said]) => [element("dt", {}, name), element("dd", {}, said)]));
}

function trail(run, architecture, point) {
  const head = ["Member", "Split", "Prediction", "Depth", ...architecture.probes.map((name, number) => `${number} ${name}`)];
  const rows = point.members.map((member) => element("tr", {},
    element("th", { scope: "row" }, member.member),
    element("td", {}, member.in_training ? "training" : "held out"),
    element("td", { className: member.prediction === point.label ? "" : "differs" }, run.className(member.prediction)),
    element("td", { className: "number" }, member.unsettled ? `${member.depth} unsettled` : member.depth),
    ...member.winner.map((winner, probe) => vote(run, point, winner, member.winner_votes[probe]))));
  return element("div", { className: "wide" }, element("table", { className: "trail" },
    element("thead", {}, element("tr", {}, ...head.map((text) => element("th", { scope: "col" }, text)))),
    element("tbody", {}, ...rows)));
}

function vote(run, point, winner, votes) {
  if (winner === null) return element("td", { className: "soft", title: "not computed" }, "–");
  const cell = element("td", {}, `${run.className(winner)} ${votes}`);
  const strength = 0.08 + 0.42 * (votes / run.k);
  cell.style.background = `rgba(var(--${winner === point.label ? "agrees" : "differs"}), ${strength})`;
  return cell;
}

function neighbours(run, architecture, point) {
  if (!run.kept) {
    return element("p", { className: "hint" },
      "The banks of this run were not kept, so neighbours cannot be shown: make a run with engine.keep_indexes: true.");
  }
  const member = element("select", {}, ...options(architecture.members.map((one) => [one.member, one.member])));
  const probe = element("select", {}, ...options(architecture.probes.map((name, number) => [number, `${number} ${name}`])));
  const found = element("ul", { className: "neighbours" });
  const told = element("p", { className: "hint", role: "status" });
  async function show() {
    told.textContent = "searching …";
    found.replaceChildren();
    try {
      const asked = new URLSearchParams({ point_id: point.point_id, member: member.value, probe: probe.value });
      const rows = await ask(`neighbours?${asked}`, "neighbours");
      told.textContent = `The ${rows.length} nearest points that ${member.value} was trained on, nearest first.`;
      found.replaceChildren(...rows.map((row) => element("li", {},
        element("button", { type: "button", className: "card", onclick: () => showPoint(run, architecture, row.point_id) },
          picture(run.data, row.point_id, "small", row.key),
          element("span", { className: row.label === point.label ? "" : "differs" }, run.className(row.label)),
          element("span", { className: "soft" }, row.distance.toPrecision(4))))));
    } catch (error) {
      if (error.name !== "AbortError") told.textContent = error.message;
    }
  }
  return element("div", {},
    element("div", { className: "bar" }, element("label", {}, "In member ", member), element("label", {}, "at probe ", probe),
      element("button", { type: "button", id: "find", onclick: show }, "Find")),
    told, found);
}
