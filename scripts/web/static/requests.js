// Requests, page by page. Filters and cursor stand in the address: the browser's "back" is the page before.

import { Table, badge, clock, h, link, requestLink } from "./dom.js";
import { ask } from "./server.js";

const STATES = ["queued", "started", "scheduled", "finished", "failed", "canceled", "stopped"];
const FILTERS = ["status", "queue", "worker", "kind", "task", "text", "within"];
const SPANS = [["900", "15 minutes"], ["3600", "an hour"], ["86400", "a day"], ["604800", "a week"]];

const COLUMNS = [
  { title: "Request", value: (item) => item.id, draw: (item) => requestLink(item.id) },
  { title: "Status", value: (item) => item.status, draw: (item) => badge(item.status) },
  { title: "Queue", value: (item) => item.queue },
  { title: "Task", class: "wide", value: (item) => item.task },
  { title: "Attempt", class: "n", value: (item) => item.attempt },
  { title: "Worker", class: "wide", value: (item) => item.worker || "–" },
  { title: "Created", value: (item) => item.created_at, draw: (item) => clock(item.created_at) },
  { title: "Error", class: "long", value: (item) => (item.error ? `${item.error.kind}: ${item.error.reason}` : "") },
];

export class Requests {
  title = "Requests";

  constructor(query) {
    this.query = query;
    this.table = new Table("Requests", COLUMNS, { empty: "No request fits." });
    this.problem = h("p", { class: "problem", role: "alert", hidden: true });
    this.queues = h("datalist", { id: "queues" });
    this.next = h("a", { class: "button", hidden: true }, "Next page");
    this.asked = 0;
    this.element = h("div", {},
      h("h1", {}, "Requests"), this.form(), this.queues, this.problem,
      h("section", { class: "panel" }, this.table.element),
      h("p", { class: "pages" }, query.get("cursor") ? link(`/requests${this.address({ cursor: "" })}`, "First page", { class: "button" }) : null, this.next));
  }

  form() {
    const chosen = (name) => this.query.get(name) || "";
    const status = h("select", { name: "status" }, h("option", { value: "" }, "any"), STATES.map((state) => h("option", { value: state, selected: chosen("status") === state }, state)));
    const within = h("select", { name: "within" }, h("option", { value: "" }, "any time"), SPANS.map(([value, label]) => h("option", { value, selected: chosen("within") === value }, label)));
    const text = (name, more = {}) => h("input", { name, value: chosen(name), placeholder: "any", autocomplete: "off", spellcheck: "false", ...more });
    const form = h("form", { class: "filters", onsubmit: (event) => { event.preventDefault(); this.apply(form); } },
      h("label", {}, "Status", status), h("label", {}, "Queue", text("queue", { list: "queues" })),
      h("label", {}, "Worker", text("worker")), h("label", {}, "Kind of failure", text("kind")),
      h("label", {}, "Task", text("task")), h("label", {}, "Text", text("text", { type: "search", title: "part of the id, the task or the reason of the failure" })),
      h("label", {}, "Submitted within", within),
      h("button", {}, "Filter"), FILTERS.some(chosen) ? link("/requests", "Clear", { class: "button plain" }) : null);
    for (const field of [status, within]) field.addEventListener("change", () => this.apply(form));
    return form;
  }

  apply(form) {
    const values = Object.fromEntries(FILTERS.map((name) => [name, form.elements[name].value.trim()]));
    location.hash = `/requests${this.address({ ...values, cursor: "" })}`;
  }

  address(changes) {
    const query = new URLSearchParams(this.query);
    for (const [name, value] of Object.entries(changes)) value ? query.set(name, value) : query.delete(name);
    return query.size ? `?${query}` : "";
  }

  async load() {
    this.asked = Date.now();
    try {
      const page = await ask(`api/requests?${this.query}`);
      this.table.update(page.items);
      this.next.hidden = !page.cursor;
      if (page.cursor) this.next.href = `#/requests${this.address({ cursor: page.cursor })}`;
      this.problem.hidden = true;
    } catch (error) {
      this.problem.textContent = error.message;
      this.problem.hidden = false;
    }
  }

  frame(frame) {
    const names = frame.queues.map((item) => item.name);
    if (names.join() !== this.names) {
      this.names = names.join();
      this.queues.replaceChildren(...names.map((name) => h("option", { value: name })));
    }
    // Further pages stay as they are: what moves would slip away under the eyes.
    if (!this.query.get("cursor") && Date.now() - this.asked > 3000) this.load();
  }
}
