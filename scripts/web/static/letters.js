// Failures, grouped by what they have in common.

import { Table, badge, clock, h, number, requestLink } from "./dom.js";
import { lettersOf, requeue } from "./requeue.js";
import { ask } from "./server.js";

const COLUMNS = [
  { title: "Request", value: (item) => item.id, draw: (item) => requestLink(item.id) },
  { title: "Queue", value: (item) => item.queue },
  { title: "Failed", value: (item) => item.ended_at, draw: (item) => clock(item.ended_at) },
  { title: "Reason", class: "long", value: (item) => item.reason },
];

export class Letters {
  title = "Dead letters";

  constructor(query, rest, app) {
    this.app = app;
    this.groups = new Map();
    this.asked = 0;
    this.problem = h("p", { class: "problem", role: "alert", hidden: true });
    this.list = h("div", { class: "groups" });
    this.note = h("p", { class: "empty" });
    this.element = h("div", {}, h("h1", {}, "Dead letters"),
      h("p", { class: "lead" }, "Failures are one group if task, kind and reason are the same but for numbers, addresses and quoted words."),
      this.problem, this.list, this.note);
  }

  async load() {
    this.asked = Date.now();
    try {
      const { items, left_out: more } = await ask("api/dead-letters");
      const groups = new Map();
      items.forEach((item, place) => {
        const group = this.groups.get(item.error) || new Group(item.error, this);
        group.update(item);
        groups.set(item.error, group);
        if (this.list.children[place] !== group.element) this.list.insertBefore(group.element, this.list.children[place] || null);
      });
      while (this.list.children.length > items.length) this.list.lastChild.remove();
      this.groups = groups;
      this.note.textContent = more ? `${more} smaller groups are not shown.` : items.length ? "" : "Nothing has failed.";
      this.problem.hidden = true;
    } catch (error) {
      this.problem.textContent = error.message;
      this.problem.hidden = false;
    }
  }

  frame(frame) {
    const failed = frame.queues.reduce((sum, item) => sum + item.failed, 0);
    if ((failed !== this.failed || !this.problem.hidden) && Date.now() - this.asked > 2000) {
      this.failed = failed;
      this.load();
    }
  }
}

class Group {
  constructor(error, page) {
    this.error = error;
    this.number = h("strong", { class: "number" });
    this.kind = h("span");
    this.reason = h("p", { class: "reason" });
    this.facts = h("p", { class: "dim" });
    this.table = new Table(`Failures of ${error}`, COLUMNS);
    this.more = h("button", { class: "plain", hidden: true, onclick: () => this.load() }, "More");
    this.single = h("div", { class: "single", id: `group-${error}`, hidden: true }, this.table.element, this.more);
    this.toggle = h("button", { class: "plain", "aria-expanded": "false", "aria-controls": this.single.id, onclick: () => this.open(this.single.hidden) }, "Show each");
    const { writable } = page.app;
    this.button = h("button", { class: "primary", disabled: !writable, title: writable ? null : "read-only: the server has no token", onclick: () => this.requeue(page) });
    this.element = h("article", { class: "panel group" },
      h("div", { class: "row" }, this.number, h("div", { class: "what" }, this.kind, this.reason, this.facts), h("div", { class: "actions" }, this.toggle, this.button)),
      this.single);
  }

  update(item) {
    this.item = item;
    this.number.textContent = number(item.number);
    this.kind.replaceChildren(badge("failed", item.kind || "RQ"));
    this.reason.textContent = item.reason;
    this.facts.replaceChildren(h("code", {}, item.task || "–"), ` on ${item.queues.join(", ")}, last `, clock(item.last), ", first ", clock(item.first), `, group ${item.error}`);
    this.button.textContent = item.number === 1 ? "Requeue 1…" : `Requeue all ${number(item.number)}…`;
    if (!this.single.hidden) this.open(true);
  }

  open(shown) {
    this.single.hidden = !shown;
    this.toggle.setAttribute("aria-expanded", String(shown));
    this.toggle.textContent = shown ? "Hide" : "Show each";
    if (shown) {
      this.items = [];
      this.cursor = 0;
      this.load();
    }
  }

  async load() {
    const before = this.items;
    const page = await ask(`api/dead-letters/${encodeURIComponent(this.error)}?limit=20&cursor=${this.cursor}`);
    if (before !== this.items) return; // it was closed, or opened anew
    this.items.push(...page.items);
    this.cursor = page.cursor;
    this.table.update(this.items);
    this.more.hidden = page.cursor === null;
    this.more.textContent = `More (${number(page.number - this.items.length)})`;
  }

  async requeue(page) {
    const { error, item } = this;
    const done = await requeue(page.app, `Requeue ${item.kind || "RQ"} of ${item.task}?`, () => lettersOf(error), item.number, [item.kind]);
    if (done) page.load();
  }
}
