// One request: what it is, its executions in time, its past, and with what it failed.

import { Chart } from "./chart.js";
import { Table, badge, clock, duration, h, link, number, panel, size } from "./dom.js";
import { act, requeue } from "./requeue.js";
import { ask, send } from "./server.js";

const EXECUTIONS = [
  { title: "Worker", value: (item) => item.worker || "–", draw: (item) => link(`/requests?worker=${encodeURIComponent(item.worker)}`, item.worker || "–") },
  { title: "Outcome", value: (item) => `${item.outcome} ${item.kind}`, draw: (item) => h("span", {}, badge(item.lost ? "lost" : item.outcome, item.outcome), item.kind ? ` ${item.kind}` : "") },
  { title: "Began", value: (item) => item.began, draw: (item) => clock(item.began) },
  { title: "Lasted", class: "n", value: (item) => (item.began === null ? "–" : item.ended === null ? "runs" : duration(item.ended - item.began)) },
  { title: "Outputs", class: "n", value: (item) => number(item.offset) },
  { title: "Checkpoint left", class: "n", value: (item) => (item.seq === null ? "–" : `no. ${item.seq}`) },
  { title: "Execution", class: "wide id", value: (item) => item.execution.slice(0, 8) || "–" },
];

const EVENTS = [
  { title: "When", value: (item) => item.at, draw: (item) => clock(item.at) },
  { title: "What", value: (item) => item.event },
  { title: "Worker", value: (item) => item.worker || "–" },
  { title: "Outputs", class: "n", value: (item) => (item.offset ? number(item.offset) : "–") },
  { title: "Why", class: "long", value: (item) => [item.kind, item.reason].filter(Boolean).join(": ") },
];

const ENDED = new Set(["finished", "failed", "canceled", "stopped"]);

export class RequestPage {
  constructor(query, id, app) {
    this.id = id;
    this.app = app;
    this.title = `Request ${id}`;
    this.asked = 0;
    this.status = h("span");
    this.facts = h("dl", { class: "facts" });
    this.chart = new Chart();
    this.executions = new Table("Executions", EXECUTIONS, { key: (item) => item.execution + item.ended, empty: "Nobody has had it yet." });
    this.history = new Table("History", EVENTS, { key: (item) => `${item.at} ${item.event} ${item.execution}`, empty: "Nothing has happened to it." });
    this.error = h("div");
    this.stacks = h("div");
    this.actions = h("p", { class: "actions" });
    this.contents = h("div");
    this.problem = h("p", { class: "problem", role: "alert", hidden: true });
    this.body = h("div", { hidden: true },
      panel("Facts", this.facts), this.contents, panel("Timeline", this.chart.element, this.executions.element), this.error,
      panel("History", this.history.element), this.stacks);
    this.element = h("div", { class: "request" },
      h("div", { class: "headline" }, h("h1", {}, "Request ", h("code", {}, id)), this.status, this.actions), this.problem, this.body);
  }

  async load() {
    this.asked = Date.now();
    try {
      this.show(await ask(`api/requests/${encodeURIComponent(this.id)}`));
      this.problem.hidden = true;
    } catch (error) {
      this.problem.textContent = error.message;
      this.problem.hidden = false;
      this.ended = error.status === 404 || error.status === 400;
    }
  }

  frame() {
    if (!this.ended && Date.now() - this.asked > 900) this.load();
  }

  show(facts) {
    const changed = facts.status !== this.last;
    this.last = facts.status;
    this.ended = ENDED.has(facts.status);
    this.body.hidden = false;
    this.status.replaceChildren(badge(facts.status));
    this.facts.replaceChildren(...pairs(facts).map(([name, text]) => h("div", {}, h("dt", {}, name), h("dd", {}, text))));
    this.chart.update(facts.chart);
    this.executions.update(facts.timeline);
    this.history.update(facts.history);
    if (!changed) return;
    this.error.replaceChildren(...failure(facts));
    this.stacks.replaceChildren(...evidence(facts.history));
    this.actions.replaceChildren(
      h("a", { class: "button plain", href: `api/requests/${encodeURIComponent(this.id)}/timeline.svg`, download: `${this.id}.svg` }, "Save the timeline"));
    this.actions.append(this.button("Payload and outputs…", () => this.reveal()));
    if (facts.status === "failed") this.actions.append(this.button("Requeue…", () => this.requeue(facts), "primary"));
    if (!this.ended) this.actions.append(this.button("Cancel the request…", () => this.cancel()));
  }

  button(label, go, kind = "plain") {
    const { writable } = this.app;
    return h("button", { class: kind, disabled: !writable, title: writable ? null : "read-only: the server has no token", onclick: go }, label);
  }

  async requeue({ id, queue, error }) {
    if (await requeue(this.app, "Requeue this request?", async () => [{ id, queue }], 1, error ? [error.kind] : [])) this.load();
  }

  async cancel() {
    const text = "A waiting request ends now. One that runs ends when its worker next writes; it may finish before.";
    const work = async (token) => {
      const { canceled } = await send(`api/requests/${encodeURIComponent(this.id)}/cancel`, token, { reason: "from the page" });
      return canceled ? "Cancel requested." : "It had already ended.";
    };
    if (await act(this.app, { title: "Cancel this request?", text, go: "Cancel it" }, work)) this.load();
  }

  async reveal() {
    const text = "They may hold what users have written. The token of this page is needed to read them.";
    const work = async (token) => {
      const found = await send(`api/requests/${encodeURIComponent(this.id)}/contents`, token);
      const part = (title, content) => panel(title, content === null ? h("p", { class: "empty" }, "None.") : h("pre", { tabindex: "0", "aria-label": title }, content));
      this.contents.replaceChildren(part("Payload", found.payload), part(found.first ? `Outputs from number ${number(found.first)}` : "Outputs", found.outputs), part("Result", found.result));
      return "Read just now.";
    };
    await act(this.app, { title: "Show payload, outputs and result?", text, go: "Show" }, work);
  }
}

function pairs(facts) {
  const { checkpoint: point } = facts;
  const found = [
    ["Queue", link(`/requests?queue=${encodeURIComponent(facts.queue)}`, facts.queue)],
    ["Task", h("code", {}, facts.task)],
    ["Attempt", `${facts.attempt}, ${facts.retries_left} ${facts.retries_left === 1 ? "retry" : "retries"} left`],
    ["Executions", number(facts.executions)],
    ["Worker", facts.worker || "–"],
    ["Outputs", number(facts.offset)],
    ["Checkpoint", point ? `no. ${point.seq} at output ${number(point.offset)}, ${size(point.bytes)}, ${duration(point.age)} old` : "none"],
  ];
  for (const [name, label] of [["due", "Due"], ["deadline", "Deadline"], ["queue_deadline", "Claim until"]]) {
    if (facts[name] !== null) found.push([label, clock(facts[name])]);
  }
  if (facts.step_timeout !== null) found.push(["Step timeout", `${facts.step_timeout} s`]);
  if (facts.degraded !== null) found.push(["Degraded", facts.degraded ? "yes, it has its overrides" : "no, but it has overrides for that"]);
  if (facts.idempotent) found.push(["Idempotent", "yes, its id is made from a key"]);
  if (facts.meta !== "{}") found.push(["Meta", facts.meta === null ? "not of plain values" : h("code", {}, facts.meta)]);
  return found;
}

function failure({ error, traceback }) {
  if (!error) return [];
  const text = h("p", { class: "note bad" }, h("span", { "aria-hidden": "true" }, "✕ "), h("strong", {}, error.kind), `: ${error.reason}`);
  return [panel("Error", text, traceback ? h("pre", { tabindex: "0", "aria-label": "Traceback" }, traceback) : null)];
}

/** Where the threads of workers stood that crashed or hung with it, the last first. */
function evidence(history) {
  const left = history.filter((event) => event.evidence).reverse();
  return left.map((event, place) =>
    h("section", { class: "panel" }, h("details", { open: place === 0 }, h("summary", {}, `Stacks of ${event.worker} at its end`), h("pre", { tabindex: "0" }, event.evidence))));
}
