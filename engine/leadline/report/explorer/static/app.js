// The page: what is chosen, and what is shown of it.

import { drawPlane, whenLookChanges } from "./charts.js";
import { $, ask, count, element, figure, options, picture, say } from "./page.js";
import { showPoint } from "./point.js";

const LIMIT = 48;
const UNPLACED = -1;
const SIDES = ["held_out_from", "held_out_to", "training_from", "training_to"];
const filters = $("filters").elements;
const sides = $("region").elements;
let run, plane, offset = 0;

const architecture = () => run.architectures.find((one) => one.name === filters.architecture.value);

// The parameters of a selection: what is empty, or belongs to nothing, is left out.
function selection() {
  const chosen = new URLSearchParams();
  for (const name of ["architecture", "label", "kind", "part", "member", "depth", "probe"]) {
    if (filters[name].value !== "" && !filters[name].disabled) chosen.set(name, filters[name].value);
  }
  if (chosen.has("probe")) chosen.set("vote", filters.vote.value);
  return chosen;
}

function withRegion(chosen) {
  for (const name of SIDES) if (sides[name].value !== "") chosen.set(name, sides[name].value);
  return chosen;
}

function inOrder() {
  const chosen = withRegion(selection());
  chosen.set("sort", $("sort").value);
  chosen.set("descending", $("descending").value);
  return chosen;
}

function region() {
  const [a, b, c, d] = SIDES.map((name) => sides[name].value);
  if (a === "" && b === "" && c === "" && d === "") return null;
  const deepest = architecture().probes.length;
  const side = (low, high) => [low === "" ? 0 : Number(low), high === "" ? deepest : Number(high)];
  return { held_out: side(a, b), training: side(c, d) };
}

// Before the server is asked for what is drawn while the mouse still moves, it has rested a little.
let waiting;
function soon(what) {
  clearTimeout(waiting);
  waiting = setTimeout(what, 150);
}

function setRegion(chosen) {
  const values = chosen ? [...chosen.held_out, ...chosen.training] : ["", "", "", ""];
  SIDES.forEach((name, i) => { sides[name].value = values[i] === "" ? "" : values[i].toFixed(2); });
}

async function showPlane() {
  try {
    plane = await ask(`plane?${selection()}`, "plane");
    await redrawPlane();
    showKinds();
  } catch (error) {
    say(error);
  }
}

const redrawPlane = () => drawPlane($("plane"), plane, architecture().probes.length, region(), (chosen) => {
  setRegion(chosen);
  soon(fromStart);
});

function showKinds() {
  const [held_out, training] = plane.thresholds ?? [null, null];
  const side = (isDeep, beyond) => (beyond === null ? "–" : `${isDeep ? ">" : "≤"} ${figure(beyond)}`);
  $("kinds").tBodies[0].replaceChildren(...run.kinds.map((name, kind) => element("tr", {},
    element("td", {}, name),
    element("td", {}, side(kind >= 2, held_out)),
    element("td", {}, side(kind % 2 === 1, training)),
    element("td", { className: "number" }, plane.kinds[kind].toLocaleString("en")))));
  $("unplaced").textContent = plane.unplaced
    ? `${count(plane.unplaced, "point")} have no place: no member holds them out, or none was trained on them.` : "";
}

async function showGallery() {
  const chosen = inOrder();
  for (const ending of ["csv", "parquet"]) $(ending).href = `download.${ending}?${chosen}`;
  chosen.set("limit", LIMIT);
  chosen.set("offset", offset);
  try {
    const page = await ask(`points?${chosen}`, "points");
    $("gallery-title").textContent = count(page.total, "point");
    $("shown").textContent = page.total
      ? `${(offset + 1).toLocaleString("en")} to ${(offset + page.points.length).toLocaleString("en")}` : "No point is chosen.";
    $("before").disabled = offset === 0;
    $("after").disabled = offset + LIMIT >= page.total;
    $("gallery").replaceChildren(...page.points.map(card));
    say(null);
  } catch (error) {
    say(error);
  }
}

function card(point) {
  const label = run.className(point.label);
  const consensus = point.consensus_class === UNPLACED ? "no consensus" : run.className(point.consensus_class);
  const differs = point.consensus_class !== point.label;
  const own = "depth" in point ? `${filters.member.value}: ${point.depth}, ${point.in_training ? "training" : "held out"}` : null;
  return element("li", {}, element("button", {
    type: "button", className: "card", title: point.key, onclick: () => showPoint(run, architecture(), point.point_id),
  },
  picture(run.data, point.point_id, "small", point.key),
  element("span", { className: "soft" }, point.key),
  element("span", { className: "label", title: `label: ${label}` }, label),
  element("span", { className: differs ? "differs" : "soft", title: `consensus: ${consensus}` }, differs ? `≠ ${consensus}` : "= consensus"),
  element("span", { className: "soft", title: "mean depth held out, in training" },
    `${figure(point.mean_depth_held_out)} | ${figure(point.mean_depth_training)}`),
  ...(own ? [element("span", { className: "soft" }, own)] : [])));
}

function fromStart() {
  offset = 0;
  return showGallery();
}

function turn(pages) {
  offset = Math.max(0, offset + pages * LIMIT);
  showGallery();
}

// What can be chosen of an architecture; a member's depth and votes only where there is a member.
function offerMembers() {
  const one = architecture();
  filters.member.replaceChildren(...options([["", "all"], ...one.members.map(({ member }) => [member, member])]));
  filters.depth.replaceChildren(...options([["", "any"], ...Array.from({ length: one.probes.length + 1 }, (_, i) => [i, i])]));
  filters.probe.replaceChildren(...options([["", "any"], ...one.probes.map((name, i) => [i, `${i} ${name}`])]));
}

function enable() {
  const member = filters.member.value !== "";
  filters.depth.disabled = filters.probe.disabled = !member;
  filters.vote.disabled = !member || filters.probe.value === "";
}

function changed() {
  enable();
  return Promise.all([showPlane(), fromStart()]);
}

async function askSql() {
  $("answered").textContent = "asking …";
  $("answer").replaceChildren();
  try {
    const sent = { method: "POST", body: JSON.stringify({ query: $("query").value }), headers: { "Content-Type": "application/json" } };
    const { columns, rows, more } = await ask("sql", "sql", sent);
    const isNumber = columns.map(({ type }) => /int|float|double|decimal/.test(type) && !/list|struct/.test(type));
    const cell = (value, i) => element("td", { className: value === null ? "null" : isNumber[i] ? "number" : "" }, value ?? "null");
    $("answered").textContent = more ? `the first ${count(rows.length, "row")}; there are more` : count(rows.length, "row");
    $("answer").replaceChildren(element("table", {},
      element("thead", {}, element("tr", {}, ...columns.map(({ name, type }, i) =>
        element("th", { scope: "col", title: type, className: isNumber[i] ? "number" : "" }, name)))),
      element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map(cell))))));
  } catch (error) {
    if (error.name !== "AbortError") $("answered").textContent = error.message;
  }
}

function about() {
  const described = run.architectures.map((one) =>
    `${one.name}: ${count(one.members.length, "member")}, ${count(one.probes.length, "probe")}`);
  document.title = `${run.name} – Leadline`;
  $("name").textContent = run.name;
  $("about").textContent = [
    count(run.points, "point"), ...described, `k = ${run.k}`, `method ${run.methods.join(", ")}`, run.status,
    `configuration ${run.configuration.slice(0, 12)}`, `data ${run.data.slice(0, 12)}`,
  ].join(" · ");
}

function offer() {
  const names = new Map(run.classes.map(({ label, name }) => [label, name]));
  run.className = (label) => names.get(label) ?? String(label);
  run.kindName = (kind) => run.kinds[kind] ?? "no place in the plane";
  filters.architecture.replaceChildren(...options(run.architectures.map(({ name }) => [name, name])));
  filters.architecture.parentElement.hidden = run.architectures.length === 1;
  filters.label.replaceChildren(...options([["", "all"], ...run.classes.map(({ label, name }) => [label, name])]));
  filters.kind.replaceChildren(...options([["", "all"], ...run.kinds.map((name, i) => [i, name]), [UNPLACED, "no place in the plane"]]));
  filters.part.replaceChildren(...options([["", "all"], ...run.parts.map((part) => [part, part])]));
  $("sort").replaceChildren(...options(run.orders.map((name) => [name, name])));
  offerMembers();
}

function listen() {
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("region").addEventListener("submit", (event) => event.preventDefault());
  $("filters").addEventListener("change", (event) => {
    if (event.target.name === "architecture") offerMembers();
    changed();
  });
  $("region").addEventListener("change", () => Promise.all([redrawPlane(), fromStart()]).catch(say));
  $("whole").addEventListener("click", () => {
    setRegion(null);
    Promise.all([redrawPlane(), fromStart()]).catch(say);
  });
  $("all").addEventListener("click", () => {
    $("filters").reset();
    offerMembers();
    setRegion(null);
    changed();
  });
  for (const id of ["sort", "descending"]) $(id).addEventListener("change", fromStart);
  $("before").addEventListener("click", () => turn(-1));
  $("after").addEventListener("click", () => turn(1));
  $("ask").addEventListener("click", askSql);
  $("query").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) askSql();
  });
  $("point").addEventListener("click", (event) => { if (event.target === $("point")) $("point").close(); });
  whenLookChanges(() => redrawPlane().catch(say));
  let width = innerWidth;
  addEventListener("resize", () => {
    if (width !== innerWidth) soon(() => redrawPlane().catch(say));
    width = innerWidth;
  });
}

try {
  run = await ask("about", "about");
  about();
  offer();
  listen();
  await changed();
  await ask("images", "images");
} catch (error) {
  say(error);
}
