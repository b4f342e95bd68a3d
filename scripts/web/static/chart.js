// One request in time: lanes are workers, bars executions, ticks checkpoints, a red cross the loss of a worker.

import { h, s } from "./dom.js";

const ROW = 22;
const GAP = 10;

/** 1, 2 or 5 times a power of ten. */
function stepOf(span, most) {
  for (let power = 0.001; ; power *= 10) {
    for (const factor of [1, 2, 5]) if (span / (power * factor) <= most) return power * factor;
  }
}

export class Chart {
  constructor() {
    this.place = h("div");
    this.caption = h("figcaption");
    this.element = h("figure", { class: "chart" }, this.place, this.caption);
    this.data = null;
    new ResizeObserver(() => this.draw()).observe(this.place);
  }

  update(data) {
    this.data = data;
    this.draw();
  }

  draw() {
    const width = Math.floor(this.place.clientWidth);
    if (!this.data || !width) return;
    const { bars, crosses, links } = this.data;
    const lanes = [...new Set(bars.map((bar) => bar.lane))];
    const narrow = width < 640; // the names of lanes stand above them
    const left = narrow ? 4 : Math.min(240, 16 + 7.2 * Math.max(0, ...lanes.map((lane) => lane.length)));
    const span = Math.max(this.data.span, 0.001);
    const high = ROW + GAP + (narrow ? 16 : 0);
    const bottom = lanes.length * high + 4;
    const x = (at) => left + ((width - left - 4) * Math.min(Math.max(at, 0), span)) / span;
    const y = (lane) => lanes.indexOf(lane) * high + (narrow ? 20 : 4);
    const parts = [s("title", {}, "Executions in time; the table below says the same")];
    const step = stepOf(span, narrow ? 5 : 10);
    const digits = step >= 1 ? 0 : step >= 0.1 ? 1 : 3;
    for (let at = 0; at <= span; at += step) {
      parts.push(s("line", { class: "grid", x1: x(at), x2: x(at), y1: 0, y2: bottom }));
      parts.push(s("text", { class: "axis", x: x(at), y: bottom + 14, "text-anchor": x(at) < 12 ? "start" : x(at) > width - 20 ? "end" : "middle" }, `${at.toFixed(digits)} s`));
    }
    for (const lane of lanes) {
      parts.push(s("rect", { class: "lane", x: left, y: y(lane) - 3, width: Math.max(0, width - left - 4), height: ROW + 6, rx: 3 }));
      const shown = narrow || lane.length < 32 ? lane : `${lane.slice(0, 30)}…`;
      parts.push(s("text", { class: "name", x: narrow ? 4 : 8, y: narrow ? y(lane) - 7 : y(lane) + 15 }, shown));
    }
    for (const [before, after] of links) {
      const [x1, y1, x2, y2] = [x(bars[before].end), y(bars[before].lane) + ROW / 2, x(bars[after].begin), y(bars[after].lane) + ROW / 2];
      const bend = Math.max(12, (x2 - x1) / 2);
      parts.push(s("path", { class: "link", d: `M${x1} ${y1}C${x1 + bend} ${y1} ${x2 - bend} ${y2} ${x2} ${y2}` }));
    }
    // What a loss is called stands right of its cross, or, where the drawing ends, over the bar, whose own label gives way.
    const late = (cross) => x(cross.at) + 16 + 8 * cross.text.length > width;
    for (const bar of bars) {
      const hidden = crosses.some((cross) => cross.lane === bar.lane && cross.at === bar.end && late(cross) && x(bar.end) - x(bar.begin) < 16 + 8 * (cross.text.length + bar.label.length));
      parts.push(...this.bar(hidden ? { ...bar, label: "" } : bar, x, y(bar.lane)));
    }
    for (const cross of crosses) {
      const [at, place] = [x(cross.at), y(cross.lane) + ROW / 2];
      parts.push(s("path", { class: "cross", d: `M${at - 6} ${place - 6}l12 12m0 -12l-12 12` }, s("title", {}, cross.title)));
      parts.push(s("text", { class: "kind", x: late(cross) ? at - 12 : at + 12, y: place + 4, "text-anchor": late(cross) ? "end" : "start" }, cross.text));
    }
    const drawing = s("svg", { width, height: bottom + 22, role: "img", "aria-label": `${bars.filter((bar) => bar.shape !== "waiting").length} executions over ${span.toFixed(1)} s` }, parts);
    this.place.replaceChildren(drawing);
    this.caption.replaceChildren(...this.legend().filter(Boolean));
  }

  bar(bar, x, y) {
    const [begin, wide] = [x(bar.begin), Math.max(2, x(bar.end) - x(bar.begin))];
    const thin = bar.shape === "waiting" ? 8 : 0;
    const parts = [s("rect", { class: `bar ${bar.shape}`, x: begin, y: y + thin, width: wide, height: ROW - 2 * thin, rx: thin ? 2 : 3 }, s("title", {}, bar.title))];
    const marks = bar.ticks.map((at) => `M${x(at)} ${y - 3}v${ROW + 6}`).join("");
    if (marks) parts.push(s("path", { class: "tick", d: marks }, s("title", {}, "checkpoint")));
    if (bar.label && wide > 12 + 6.6 * bar.label.length) parts.push(s("text", { class: "inside", x: begin + 6, y: y + 15 }, bar.label));
    return parts;
  }

  legend() {
    const { bars, crosses, links } = this.data;
    const sign = (content, text) => h("span", {}, s("svg", { width: 20, height: 12, "aria-hidden": "true" }, content), text);
    const shapes = new Set(bars.map((bar) => bar.shape));
    return [
      ...["running", "finished", "failed", "lost", "ended"].filter((shape) => shapes.has(shape)).map((shape) => sign(s("rect", { class: `bar ${shape}`, width: 20, height: 12, rx: 2 }), shape)),
      bars.some((bar) => bar.ticks.length) ? sign(s("path", { class: "tick", d: "M10 0v12" }), "checkpoint") : null,
      crosses.length ? sign(s("path", { class: "cross", d: "M5 1l10 10m0 -10l-10 10" }), "worker lost") : null,
      links.length ? sign(s("path", { class: "link", d: "M0 6h20" }), "goes on elsewhere") : null,
      shapes.has("waiting") ? sign(s("rect", { class: "bar waiting", y: 3, width: 20, height: 6 }), "waits") : null,
    ];
  }
}
