"use strict";

// The result table: a heading sorts the quantized results, best first where the column knows what is better.
const table = document.getElementById("results-table");
const body = table.querySelector("tbody.quantized");

function sortBy(button) {
  const heading = button.parentElement;
  const index = Number(button.dataset.column);
  const before = heading.getAttribute("aria-sort");
  const first = button.dataset.better === "1" ? "descending" : "ascending";
  const order = before === "none" ? first : before === "ascending" ? "descending" : "ascending";
  for (const other of table.querySelectorAll("thead th")) other.setAttribute("aria-sort", "none");
  heading.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  const rows = Array.from(body.rows, (row) => ({ row, value: row.cells[index].dataset.value }));
  const areNumbers = rows.every(({ value }) => value === undefined || !Number.isNaN(number(value)));
  const compare = areNumbers ? (a, b) => (number(a) > number(b)) - (number(a) < number(b)) : (a, b) => a.localeCompare(b);
  rows.sort(({ value: a }, { value: b }) => {
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
    return sign * compare(a, b);
  });
  body.append(...rows.map(({ row }) => row));
}

function number(text) {
  return text === "inf" ? Infinity : Number(text);
}

function filter() {
  const words = document.getElementById("filter").value.toLowerCase().split(/\s+/);
  let shown = 0;
  for (const row of body.rows) {
    const text = `${row.title} ${row.textContent}`.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
    shown += !row.hidden;
  }
  document.getElementById("shown").value = `${shown} of ${body.rows.length} results`;
}

if (body) {
  for (const button of table.querySelectorAll("thead button")) button.addEventListener("click", () => sortBy(button));
  document.getElementById("filter").addEventListener("input", filter);
  filter();
}

// Figures: drawn when they come near, in the page's own colors, light or dark.
const CONFIG = { responsive: true, displaylogo: false, toImageButtonOptions: { format: "svg" } };

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function themed(layout) {
  const axis = { gridcolor: color("--line"), linecolor: color("--rule"), tickcolor: color("--rule") };
  const clear = "rgba(0,0,0,0)";
  const result = {
    ...layout,
    paper_bgcolor: clear,
    plot_bgcolor: clear,
    font: { family: getComputedStyle(document.body).fontFamily, color: color("--ink"), size: 13 },
    modebar: { bgcolor: clear, color: color("--rule"), activecolor: color("--accent") },
    hoverlabel: { bgcolor: color("--card"), bordercolor: color("--rule"), font: { color: color("--ink") }, align: "left" },
  };
  for (const key of Object.keys(layout)) if (/^[xy]axis/.test(key)) result[key] = { ...axis, ...layout[key] };
  return result;
}

function draw(figure) {
  figure.charts ??= JSON.parse(figure.querySelector(".charts").textContent);
  const chart = figure.charts[Number(figure.querySelector("select")?.value ?? 0)];
  Plotly.react(figure.querySelector(".chart"), chart.data, themed(chart.layout), CONFIG);
}

const figures = document.querySelectorAll("figure");
const near = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) {
      if (isIntersecting && !target.charts) draw(target);
    }
  },
  { rootMargin: "600px" },
);
for (const figure of figures) {
  near.observe(figure);
  figure.querySelector("select")?.addEventListener("change", () => draw(figure));
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const figure of figures) if (figure.charts) draw(figure);
});
addEventListener("beforeprint", () => figures.forEach((figure) => figure.charts || draw(figure)));

// The runs behind a figure, listed when they are asked for.
const runs = JSON.parse(document.getElementById("run-data").textContent);

function element(name, ...content) {
  const made = document.createElement(name);
  made.append(...content);
  return made;
}

function list(details) {
  const head = ["run", "seed", "commit", "started (UTC)", "configuration of its own"].map((text) => {
    const heading = element("th", text);
    heading.scope = "col";
    return heading;
  });
  const rows = JSON.parse(details.dataset.runs).map((i) => {
    const run = runs[i];
    const config = Object.entries(run.config).map(([key, value]) => `${key}=${value}`);
    return element(
      "tr",
      element("td", run.reused_from ? `${run.folder} (numbers of ${run.reused_from})` : run.folder),
      element("td", run.seed ?? ""),
      element("td", element("code", run.commit)),
      element("td", run.started),
      element("td", config.join(", ")),
    );
  });
  const made = element("div", element("table", element("thead", element("tr", ...head)), element("tbody", ...rows)));
  made.className = "scroll";
  details.append(made);
}

for (const details of document.querySelectorAll("details.behind")) {
  details.addEventListener("toggle", () => list(details), { once: true });
}
