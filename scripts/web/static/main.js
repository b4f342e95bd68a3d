// Which page is shown, and what all of them have: the stream, the mode, the banner.

import { clock, h, number } from "./dom.js";
import { Letters } from "./letters.js";
import { Overview } from "./overview.js";
import { RequestPage } from "./request.js";
import { Requests } from "./requests.js";
import { Stream, ask } from "./server.js";

const KEPT = 120;
const PAGES = { "": [Overview, "overview"], requests: [Requests, "requests"], request: [RequestPage, "requests"], "dead-letters": [Letters, "letters"] };

const part = (id) => document.getElementById(id);

class App {
  writable = false;
  final = [];
  page = null;
  last = null;
  history = [];
  silent = false;

  async start() {
    addEventListener("hashchange", () => this.route());
    part("search").addEventListener("submit", (event) => {
      event.preventDefault();
      const id = event.target.elements.id.value.trim();
      if (id) location.hash = `/request/${encodeURIComponent(id)}`;
      event.target.reset();
    });
    addEventListener("keydown", (event) => {
      const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) || part("dialog").open;
      if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
        event.preventDefault();
        part("search").elements.id.focus();
      }
    });
    document.querySelector(".skip").addEventListener("click", (event) => {
      event.preventDefault();
      part("main").focus();
    });
    await this.about();
    this.route();
    new Stream({ history: (points) => (this.history = points), frame: (frame) => this.frame(frame), lost: () => this.lost() });
  }

  async about() {
    try {
      const { version, where, writable, final } = await ask("api/about");
      this.writable = writable;
      this.final = final;
      part("where").textContent = `${where} · perdure ${version} · ${writable ? "a token lets you requeue, cancel and read payloads" : "read-only"}`;
    } catch (error) {
      this.banner(error.message);
    }
  }

  route() {
    const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
    const [name, ...rest] = path.split("/");
    const [Page, tab] = PAGES[name] || PAGES[""];
    let id = rest.join("/");
    try {
      id = decodeURIComponent(id);
    } catch {
      // A "%" that a person typed into the address: it is part of the id then.
    }
    this.page = new Page(new URLSearchParams(query), id, this);
    document.title = `${this.page.title} · Perdure`;
    part("main").replaceChildren(this.page.element);
    for (const link of document.querySelectorAll("nav a")) {
      if (link.dataset.page === tab) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    scrollTo(0, 0);
    this.page.load?.();
    if (this.last) this.page.frame(this.last, this.history);
  }

  frame(frame) {
    if (this.silent) this.about(); // another release, or another token, may have come
    this.silent = false;
    if (frame.away) {
      this.banner("Redis is away since ", clock(frame.away.since), ". ", this.last ? "What stands here is from then. " : "", `${frame.away.reason}`);
      this.live("away", "✕ Redis is away");
      return;
    }
    part("banner").hidden = true;
    this.live("on", "● live");
    this.last = frame;
    const { at, queues, mode, server } = frame;
    const add = (name) => queues.reduce((sum, item) => sum + item[name], 0);
    const rates = queues.map((item) => item.per_second).filter(Boolean);
    const ends = rates.length ? rates.reduce((sum, item) => sum + item.finished, 0) : null;
    this.history = [...this.history.filter((point) => point[0] < at - 0.01), [at, add("waiting"), add("running"), add("failed"), ends, server.memory.used]].slice(-KEPT);
    const failed = add("failed");
    part("failed").textContent = number(failed);
    part("failed").hidden = !failed;
    part("mode").hidden = false;
    part("mode").className = `pill ${mode.degraded ? "bad" : "good"}`;
    part("mode").textContent = `${mode.degraded ? "▲ degraded" : "✓ normal"}, ${mode.live} of ${mode.expected} workers`;
    part("seen").replaceChildren("seen at ", clock(at));
    this.page.frame(frame, this.history);
  }

  lost() {
    this.silent = true;
    this.live("away", "✕ disconnected");
    this.banner("The server of this page does not answer; it is asked again every few seconds. ", this.last ? "What stands here is from " : "", this.last ? clock(this.last.at) : "");
  }

  live(kind, text) {
    const element = part("live");
    if (element.textContent !== text) element.textContent = text;
    element.className = `pill ${kind}`;
    document.body.classList.toggle("stale", kind === "away");
  }

  banner(...text) {
    const element = part("banner");
    const content = h("p", {}, h("span", { "aria-hidden": "true" }, "▲ "), ...text);
    // An alert that is written anew is read aloud anew.
    if (element.textContent !== content.textContent) element.replaceChildren(content);
    element.hidden = false;
  }

  say(text) {
    const element = h("p", { class: "toast", role: "status" }, `✓ ${text}`);
    document.body.append(element);
    setTimeout(() => element.remove(), 6000);
  }
}

new App().start();
