// The charts, by Vega-Lite. As SVG, so that they are sharp, and can be read by other programs.

import { element } from "./page.js";

const dark = matchMedia("(prefers-color-scheme: dark)");
export const whenLookChanges = (draw) => dark.addEventListener("change", draw);

const library = new Promise((resolve, reject) => {
  const failed = () => reject(new Error("the charts' library could not be read; restart leadline explore"));
  document.head.append(
    element("script", { src: "vega.js", onload: () => resolve(window.vegaEmbed), onerror: failed }),
  );
});

const tip = element("div", { className: "tip", hidden: true });

function showTip(_handler, event, _item, value) {
  tip.hidden = !value;
  if (!value) return;
  (event.target.closest?.("dialog") ?? document.body).append(tip);
  tip.textContent = Object.entries(value).map(([name, said]) => `${name}: ${said}`).join("\n");
  tip.style.left = `${Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 4)}px`;
  tip.style.top = `${Math.min(event.clientY + 12, innerHeight - tip.offsetHeight - 4)}px`;
}

function look() {
  const [text, line] = dark.matches ? ["#c4ccd2", "#343d45"] : ["#3d464d", "#e3e6e9"];
  const words = { labelColor: text, titleColor: text, labelFontSize: 11, titleFontSize: 12, titleFontWeight: "normal" };
  return {
    background: null, font: "system-ui, 'Liberation Sans', sans-serif", view: { stroke: line },
    axis: { ...words, gridColor: line, domainColor: line, tickColor: line }, legend: words,
  };
}

// The last chart of each place. One is drawn when the one before is there, which then ends.
const drawn = new WeakMap();

function draw(place, spec) {
  const made = (drawn.get(place) ?? Promise.resolve(null)).catch(() => null).then(async (before) => {
    const embed = await library;
    before?.finalize();
    return embed(place, { autosize: { type: "fit", contains: "padding" }, config: look(), ...spec }, {
      mode: "vega-lite", renderer: "svg", actions: false, ast: true, defaultStyle: false, tooltip: showTip,
    });
  });
  drawn.set(place, made);
  return made;
}

// Bins of the plane with the kinds' thresholds; chosen(region) is called when one is drawn, with null for none.
export async function drawPlane(place, plane, deepest, region, chosen) {
  const half = plane.step / 2;
  const axis = (field, title) => ({
    field, type: "quantitative", title, scale: { domain: [-half, deepest + half], nice: false, zero: false },
    axis: { tickMinStep: 1, tickCount: 7, grid: false },
  });
  const values = plane.bins.map((bin) => ({
    ...bin, x: bin.held_out - half, x2: bin.held_out + half, y: bin.training - half, y2: bin.training + half,
  }));
  const rules = (field, value) => ({
    data: { values: [{ [field]: value }] },
    mark: { type: "rule", strokeDash: [5, 4], color: dark.matches ? "#e69f00" : "#b35900", tooltip: null },
    encoding: { [field]: { field, type: "quantitative" } },
  });
  const most = Math.max(10, ...plane.bins.map((bin) => bin.points));
  const width = place.clientWidth;
  const made = await draw(place, {
    description: `Plane of mean depths: ${values.length} bins with points`,
    width, height: Math.min(width * 0.95, 420),
    layer: [
      {
        data: { values },
        params: [{
          name: "region", select: { type: "interval", encodings: ["x", "y"], mark: { fill: "#888", fillOpacity: 0.15 } },
          ...(region ? { value: { x: region.held_out, y: region.training } } : {}),
        }],
        mark: "rect",
        encoding: {
          x: axis("x", "mean depth, held out"), x2: { field: "x2" },
          y: axis("y", "mean depth, training"), y2: { field: "y2" },
          color: {
            field: "points", type: "quantitative",
            scale: { type: "log", domain: [1, most], range: dark.matches ? ["#244456", "#ffe9a8"] : ["#d3e5f2", "#08306b"] },
            legend: { title: "points", orient: "top", direction: "horizontal", gradientLength: Math.min(180, width / 2), tickCount: 4, format: "~s" },
          },
          tooltip: [
            { field: "held_out", title: "held out, about" }, { field: "training", title: "training, about" },
            { field: "points", title: "points", format: "," },
          ],
        },
      },
      ...(plane.thresholds ? [rules("x", plane.thresholds[0]), rules("y", plane.thresholds[1])] : []),
    ],
  });
  made.view.addSignalListener("region", (_, value) => {
    chosen(value.x && value.y ? { held_out: sorted(value.x), training: sorted(value.y) } : null);
  });
  return made;
}

const sorted = (pair) => [...pair].sort((a, b) => a - b);

// The share of members that give a point its label, along training.
export async function drawLearning(place, rows) {
  const values = rows.map((row) => ({ ...row, split: row.in_training ? "training" : "held out" }));
  const ticks = [0, ...Array.from({ length: 9 }, (_, power) => 10 ** power)];
  const colours = dark.matches ? ["#56b4e9", "#e69f00"] : ["#0072b2", "#d55e00"];
  return draw(place, {
    description: "Share of members that predict the label, by step of training",
    width: place.clientWidth, height: 190, data: { values },
    mark: { type: "line", point: { size: 22 }, interpolate: "step-after", strokeWidth: 1.5 },
    encoding: {
      x: { field: "step", type: "quantitative", scale: { type: "symlog" }, axis: { values: ticks, grid: false }, title: "step" },
      y: { field: "right", type: "quantitative", scale: { domain: [0, 1] }, axis: { tickCount: 3 }, title: "share of members" },
      color: {
        field: "split", type: "nominal", scale: { domain: ["training", "held out"], range: colours },
        legend: { title: null, orient: "top" },
      },
      tooltip: [
        { field: "step" }, { field: "split" }, { field: "right", title: "predict the label", format: ".0%" },
        { field: "members" },
      ],
    },
  });
}
