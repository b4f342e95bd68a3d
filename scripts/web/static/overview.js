// The whole pool: figures with their curves, queues, workers, what runs, and how hard Redis has it.

import { Table, badge, clock, curve, duration, h, link, meter, number, panel, requestLink, size } from "./dom.js";

const rate = (name) => (item) => (item.per_second ? item.per_second[name].toFixed(1) : "–");

const QUEUES = [
  { title: "Queue", value: (item) => item.name, draw: (item) => link(`/requests?queue=${encodeURIComponent(item.name)}`, item.name) },
  { title: "Waiting", class: "n", value: (item) => number(item.waiting) + (item.suspects ? ` (${item.suspects} suspect)` : "") },
  { title: "Oldest", class: "n", value: (item) => duration(item.oldest) },
  { title: "Later", class: "n wide", value: (item) => number(item.due_later) },
  { title: "Running", class: "n", value: (item) => number(item.running) },
  { title: "Failed", class: "n", value: (item) => item.failed, draw: (item) => item.failed ? link("/dead-letters", `✕ ${number(item.failed)}`, { class: "bad" }) : "0" },
  { title: "Workers", class: "n", value: (item) => item.workers, draw: (item) => item.workers || !item.waiting ? number(item.workers) : h("span", { class: "bad" }, "▲ none") },
  { title: "In/s", class: "n wide", value: rate("submitted") },
  { title: "Done/s", class: "n", value: rate("finished") },
  { title: "Failed/s", class: "n wide", value: rate("failed") },
];

const READY = { ready: ["started", "ready"], loading: ["scheduled", "loading"], leaving: ["failed", "leaving"], late: ["failed", "silent"], partly: ["scheduled", "not for all"] };

function standing(item) {
  if (item.dead_in < 0) return "late";
  return item.leaving ? "leaving" : !item.ready ? "loading" : (item.unable || []).length ? "partly" : "ready";
}

const WORKERS = [
  { title: "Worker", value: (item) => item.name, draw: (item) => link(`/requests?worker=${encodeURIComponent(item.name)}`, item.name) },
  { title: "State", value: standing, draw: (item) => badge(...READY[standing(item)]) },
  { title: "Held", value: (item) => `${item.held}/${item.slots}`, draw: held },
  { title: "Device", value: (item) => item.device || "–" },
  { title: "Beat", class: "n", value: (item) => duration(item.beat_age) },
  { title: "Queues", class: "short", value: (item) => item.queues.join(", "), draw: (item) => h("span", { title: item.queues.join(", ") }, item.queues.join(", ")) },
  { title: "Host", class: "wide", value: (item) => `${item.host}:${item.pid}` },
];

function held(item) {
  if (!item.slots) return number(item.held);
  return h("span", { class: "held" }, `${item.held} of ${item.slots}`, meter(item.held / item.slots));
}

const RUNNING = [
  { title: "Request", value: (item) => item.id, draw: (item) => requestLink(item.id) },
  { title: "Lease", class: "n", value: (item) => duration(item.expires_in), draw: (item) => h("span", { class: item.expires_in < 0 ? "bad" : "" }, (item.expires_in < 0 ? "▲ overdue " : "") + duration(Math.abs(item.expires_in))) },
  { title: "Worker", value: (item) => item.worker || "–" },
  { title: "Task", value: (item) => item.task || "(plain job)", draw: (item) => h("span", { title: item.task }, item.task ? item.task.split(".").at(-1) : "(plain job)") },
  { title: "Queue", class: "wide", value: (item) => item.queue },
];

/** The tiles: title, place in a point of the history, and what it says. */
const TILES = [
  ["Waiting", 1, (sums) => number(sums.waiting), (sums) => (sums.oldest === null ? "nothing waits" : `oldest ${duration(sums.oldest)}`)],
  ["Running", 2, (sums) => number(sums.running), (sums, frame) => `on ${frame.workers.length + frame.left_out.workers} workers`],
  ["Finished per second", 4, (sums) => (sums.rate === null ? "–" : sums.rate.toFixed(1)), (sums) => `${number(sums.ended)} in all`],
  ["Dead letters", 3, (sums) => number(sums.failed), (sums) => (sums.lost === null ? "–" : `${sums.lost.toFixed(1)} per second`)],
  ["Redis memory", 5, (sums, frame) => size(frame.server.memory.used), (sums, frame) => memoryNote(frame.server.memory)],
];

function memoryNote(memory) {
  if (memory.used === null) return "not told to this user";
  return memory.limit ? `of ${size(memory.limit)}, ${Math.round(100 * memory.ratio)} %` : "no limit is set";
}

function sums(frame) {
  const add = (name) => frame.queues.reduce((sum, item) => sum + item[name], 0);
  const ages = frame.queues.map((item) => item.oldest).filter((age) => age !== null);
  const rates = frame.queues.map((item) => item.per_second).filter(Boolean);
  return {
    waiting: add("waiting"), running: add("running"), failed: add("failed"),
    ended: frame.queues.reduce((sum, item) => sum + (item.counters.finished || 0), 0),
    oldest: ages.length ? Math.max(...ages) : null,
    rate: rates.length ? rates.reduce((sum, item) => sum + item.finished, 0) : null,
    lost: rates.length ? rates.reduce((sum, item) => sum + item.failed, 0) : null,
  };
}

export class Overview {
  title = "Overview";

  constructor() {
    this.notes = h("div", { class: "notes" });
    this.tiles = TILES.map(([title]) => ({ title, value: h("strong"), note: h("small"), figure: h("div", { class: "figure" }) }));
    this.queues = new Table("Queues", QUEUES, { key: (item) => item.name, empty: "No queue has ever had a request." });
    this.workers = new Table("Workers", WORKERS, { key: (item) => item.incarnation, empty: "No worker lives." });
    this.running = new Table("Running, the next lease to end first", RUNNING, { empty: "Nothing is held." });
    this.redis = h("dl", { class: "facts" });
    this.slow = new Table("Slow commands of Redis", SLOW, { key: (item) => `${item.at} ${item.command} ${item.seconds}` });
    this.more = h("p", { class: "empty" });
    this.element = h("div", { class: "overview" },
      h("h1", { class: "aside" }, "Overview"), this.notes,
      h("div", { class: "tiles" }, this.tiles.map((tile) => h("div", { class: "tile" }, h("span", {}, tile.title), tile.value, tile.note, tile.figure))),
      panel("Queues", this.queues.element),
      panel("Workers", this.workers.element, this.more), panel("Running, the next lease to end first", this.running.element),
      panel("Redis", h("div", { class: "redis" }, this.redis, this.slow.element)));
  }

  frame(frame, history) {
    const facts = sums(frame);
    TILES.forEach(([, place, value, note], index) => {
      const tile = this.tiles[index];
      tile.value.textContent = value(facts, frame);
      tile.note.textContent = note(facts, frame);
      tile.figure.replaceChildren(curve(history.map((point) => [point[0], point[place]]), frame.at));
    });
    this.queues.update(frame.queues);
    this.workers.update(frame.workers);
    this.running.update(frame.running);
    const { queues, workers } = frame.left_out;
    this.more.textContent = [queues && `${queues} more queues are not shown.`, workers && `${workers} more workers are not shown.`].filter(Boolean).join(" ");
    this.notes.replaceChildren(...notes(frame));
    this.redis.replaceChildren(...redis(frame.server));
    this.slow.update(frame.server.slow || []);
    this.slow.empty.textContent = frame.server.slow ? "No slow command." : "The user of this server may not ask for slow commands.";
  }
}

const SLOW = [
  { title: "When", value: (item) => item.at, draw: (item) => clock(item.at) },
  { title: "Took", class: "n", value: (item) => `${(1000 * item.seconds).toFixed(1)} ms` },
  { title: "Command", value: (item) => item.command },
];

/** What a person should know first. */
function notes(frame) {
  const found = [];
  const note = (kind, ...text) => found.push(h("p", { class: `note ${kind}` }, h("span", { "aria-hidden": "true" }, "▲ "), ...text));
  const { mode, server } = frame;
  if (mode.degraded) note("bad", `The pool is degraded: ${mode.live} of ${mode.expected} workers, since `, clock(mode.since), ". It refuses low priority and asks less of itself until they are back.");
  for (const item of frame.workers) {
    for (const lack of item.unable || []) note("bad", `${item.name} could not load ${lack.task}: ${lack.reason}`);
    if (item.held && item.checkpoint_interval > 1.5 * item.usual_checkpoint_interval) note("warn", `Redis is busy: ${item.name} checkpoints every ${duration(item.checkpoint_interval)} instead of every ${duration(item.usual_checkpoint_interval)}. A crash costs that much work.`);
  }
  for (const item of frame.unfit) note("bad", `${item.device} on ${item.host} is not used: ${item.reason} (${item.worker}, `, clock(item.at), ")");
  for (const item of frame.quarantined) note("bad", `${item.place} of ${item.host} is quarantined: ${item.reason || "it ended again and again"}. ${item.release ? `To try it again: ${item.release}` : ""}`);
  const unserved = frame.queues.filter((item) => item.waiting && !item.workers).map((item) => item.name);
  if (unserved.length) note("warn", `Nobody serves ${unserved.join(", ")}.`);
  if (server.memory.policy && server.memory.policy !== "noeviction") note("warn", `maxmemory-policy is ${server.memory.policy}: requests may be thrown away. Set noeviction.`);
  if (server.memory.ratio > 0.9) note("bad", `Redis is at ${Math.round(100 * server.memory.ratio)} % of its memory.`);
  if (server.persistence.aof === false) note("warn", "The append-only file is off: what was accepted does not survive the end of Redis.");
  return found;
}

const or = (value) => (value === null || value === undefined ? "–" : String(value));

function redis({ version, uptime, keys, memory, persistence, load, latency }) {
  const on = { true: "on", false: "off" }[persistence.aof] || "–";
  const facts = [
    ["Server", `${or(version)}, up ${duration(uptime)}, ${number(keys)} keys`],
    ["Memory", memory.ratio === null ? `${size(memory.used)}, peak ${size(memory.peak)}, fragmentation ${or(memory.fragmentation)}` : [`${size(memory.used)} of ${size(memory.limit)}`, meter(memory.ratio, memory.ratio > 0.9 ? "bad" : "")]],
    ["Policy", `${or(memory.policy)}, ${or(memory.evicted)} keys evicted`],
    ["AOF", `${on}, fsync ${or(persistence.fsync)}, last write ${or(persistence.last_write)}, ${or(persistence.delayed_fsyncs)} delayed`],
    ["Load", `${or(load.commands_per_s)} commands/s, ${or(load.clients)} clients, ${or(load.blocked)} blocked`],
    ["Round trip", `${(1000 * latency.median).toFixed(2)} ms, at most ${(1000 * latency.max).toFixed(2)} ms`],
  ];
  return facts.map(([name, text]) => h("div", {}, h("dt", {}, name), h("dd", {}, text)));
}
