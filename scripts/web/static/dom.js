// Elements, made of names and texts. Text comes from outside (errors, names of workers): it becomes text nodes only.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** An element of HTML with attributes, listeners (onclick …) and children; texts become text. */
export function h(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** An element of SVG. */
export function s(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

// --- words for people, the same as the commands' ---------------------------------------------------------------

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const left = Math.abs(seconds);
  const sign = seconds < 0 ? "−" : "";
  for (const [unit, size] of [["d", 86400], ["h", 3600], ["min", 60]]) {
    if (left >= 2 * size) return `${sign}${Math.round(left / size)} ${unit}`;
  }
  return left < 10 ? `${sign}${left.toFixed(1)} s` : `${sign}${Math.round(left)} s`;
}

export function size(number) {
  if (number === null || number === undefined) return "–";
  for (const unit of ["B", "KiB", "MiB"]) {
    if (number < 1024) return `${unit === "B" ? Math.round(number) : number.toFixed(1)} ${unit}`;
    number /= 1024;
  }
  return `${number.toFixed(1)} GiB`;
}

const GROUPED = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

export function number(value) {
  return value === null || value === undefined ? "–" : GROUPED.format(value);
}

/** The time of day here; the date too if it is not today's. The title has it in UTC. */
export function clock(date) {
  const at = typeof date === "number" ? new Date(date * 1000) : new Date(date || NaN);
  if (Number.isNaN(at.getTime())) return h("span", {}, "–");
  const today = at.toDateString() === new Date().toDateString();
  const two = (part) => String(part).padStart(2, "0");
  const time = `${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;
  const day = `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} `;
  return h("time", { datetime: at.toISOString(), title: at.toISOString() }, today ? time : day + time);
}

const MARKS = {
  queued: "○", scheduled: "◷", started: "▶", running: "▶", finished: "✓", failed: "✕", canceled: "⊘", stopped: "■",
  redelivered: "↻", retry: "↻", released: "⇥", lost: "✕",
};

/** A state: a sign, a word and a colour, in this order of importance. */
export function badge(state, text = state) {
  return h("span", { class: `badge ${MARKS[state] ? state : "other"}` }, h("span", { "aria-hidden": "true" }, MARKS[state] || "·"), ` ${text}`);
}

export function link(path, text, attributes = {}) {
  return h("a", { href: `#${path}`, ...attributes }, text);
}

export const requestLink = (id) => link(`/request/${encodeURIComponent(id)}`, id, { class: "id" });

// --- figures ----------------------------------------------------------------------------------------------------

/** A bar that is full to this share. */
export function meter(share, kind = "") {
  const width = Math.max(0, Math.min(1, share)) * 100;
  return s("svg", { class: `meter ${kind}`, viewBox: "0 0 100 6", preserveAspectRatio: "none", "aria-hidden": "true" },
    s("rect", { class: "ground", width: 100, height: 6 }), s("rect", { class: "level", width, height: 6 }));
}

/** A curve of [time, value] pairs over the last two minutes; a pause is a gap. */
export function curve(points, until, span = 120) {
  const known = points.filter(([at, value]) => value !== null && at >= until - span);
  const most = Math.max(1e-9, ...known.map(([, value]) => value));
  const pieces = [];
  let last = -Infinity;
  for (const [at, value] of known) {
    if (at - last > 10) pieces.push([]);
    pieces.at(-1).push([((100 * (at - until + span)) / span).toFixed(2), (22 - (20 * value) / most).toFixed(2)]);
    last = at;
  }
  const lines = pieces.map((piece) => `M${piece.map((pair) => pair.join(" ")).join("L")}`);
  const areas = pieces.map((piece, place) => `${lines[place]}V24H${piece[0][0]}Z`);
  return s("svg", { class: "curve", viewBox: "0 0 100 24", preserveAspectRatio: "none", "aria-hidden": "true" },
    s("path", { class: "area", d: areas.join("") || "M0 0" }), s("path", { class: "line", d: lines.join("") || "M0 0" }));
}

// --- tables -----------------------------------------------------------------------------------------------------

/**
 * A table that is brought up to date row by row, so that focus, selection and scroll stay where they are.
 * A column: title, value(item) → what it says; with draw(item), a node is drawn when that changes.
 */
export class Table {
  constructor(title, columns, { empty = "None.", key = (item) => item.id } = {}) {
    this.columns = columns;
    this.key = key;
    this.rows = new Map();
    this.body = h("tbody");
    this.empty = h("p", { class: "empty" }, empty);
    const head = columns.map((column) => h("th", { scope: "col", class: column.class }, column.title));
    this.table = h("table", {}, h("caption", { class: "aside" }, title), h("thead", {}, h("tr", {}, head)), this.body);
    this.element = h("div", { class: "scroll", role: "region", "aria-label": title, tabindex: "0" }, this.table, this.empty);
  }

  update(items) {
    const rows = new Map();
    items.forEach((item, place) => {
      const key = this.key(item);
      let row = this.rows.get(key);
      if (!row || rows.has(key)) {
        row = { element: h("tr", {}, this.columns.map((column) => h("td", { class: column.class }))), said: [] };
      }
      rows.set(key, row);
      this.columns.forEach((column, number) => {
        const said = column.value(item);
        if (row.said[number] === said && row.said.length > number) return;
        row.said[number] = said;
        row.element.children[number].replaceChildren(column.draw ? column.draw(item) : String(said ?? "–"));
      });
      if (this.body.children[place] !== row.element) this.body.insertBefore(row.element, this.body.children[place] || null);
    });
    while (this.body.children.length > items.length) this.body.lastChild.remove();
    this.rows = rows;
    this.table.hidden = items.length === 0;
    this.empty.hidden = items.length > 0;
  }
}

export function panel(title, ...content) {
  return h("section", { class: "panel" }, h("h2", {}, title), ...content);
}
