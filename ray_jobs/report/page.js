"use strict";
// Draws a figure when it comes near the screen, in the theme's colours, and again when the theme changes.

const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const finger = matchMedia("(pointer: coarse)").matches;
const drawn = new Set();

function themed(value, style) {
  if (typeof value === "string") {
    if (!value.startsWith("--")) return value;
    const [name, alpha] = value.split("/");
    const colour = style.getPropertyValue(name).trim();
    if (!alpha) return colour;
    const [r, g, b] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
    return `rgba(${r},${g},${b},${alpha})`;
  }
  if (Array.isArray(value)) {
    return typeof value[0] === "object" && value[0] !== null ? value.map((part) => themed(part, style)) : value;
  }
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, themed(part, style)]));
  }
  return value;
}

function draw(place) {
  const style = getComputedStyle(document.documentElement);
  const figure = themed(figures[place.id], style);
  figure.layout.font.family = getComputedStyle(document.body).fontFamily;
  if (figure.layout.legend && place.clientWidth < 480) {
    Object.assign(figure.layout.legend, { entrywidthmode: "fraction", entrywidth: 0.48 }); // else one name a line
  }
  if (finger) figure.layout.dragmode = false; // a finger scrolls the page
  Plotly.react(place, figure.data, figure.layout, {
    responsive: true,
    displaylogo: false,
    displayModeBar: finger ? false : "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  });
  drawn.add(place);
}

const watcher = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      watcher.unobserve(entry.target);
      draw(entry.target);
    }
  },
  { rootMargin: "400px" },
);
for (const place of document.querySelectorAll(".plot")) watcher.observe(place);
dark.addEventListener("change", () => drawn.forEach(draw));
addEventListener("beforeprint", () => document.querySelectorAll(".plot").forEach(draw));

// Tabs: one table at a time.
for (const tabs of document.querySelectorAll(".tabs")) {
  const show = () => {
    for (const input of tabs.querySelectorAll("input")) {
      document.getElementById(input.value).hidden = !input.checked;
    }
  };
  tabs.addEventListener("change", show);
  show();
}

// The table of trials: sorted by a heading, filtered by words.
const table = document.getElementById("trials");
if (table) {
  const body = table.tBodies[0];
  const key = (row, column) => {
    const cell = row.cells[column];
    const raw = cell.dataset.v ?? cell.textContent;
    const number = Number(raw);
    return raw === "" || Number.isNaN(number) ? raw : number;
  };
  table.tHead.addEventListener("click", (event) => {
    const heading = event.target.closest("th");
    if (!heading) return;
    const up = heading.getAttribute("aria-sort") !== "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const column = heading.cellIndex;
    const rows = [...body.rows].map((row) => [key(row, column), row]);
    rows.sort(([a], [b]) => {
      if (a === "" || b === "") return (a === "") - (b === ""); // what is not known stays at the end
      const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
      return up ? order : -order;
    });
    body.append(...rows.map(([, row]) => row));
  });
  document.getElementById("filter").addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of body.rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    document.getElementById("shown").textContent = `${shown} of ${body.rows.length}`;
  });
}
