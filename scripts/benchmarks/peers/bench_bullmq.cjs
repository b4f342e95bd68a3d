// BullMQ: fifty jobs at once, addBulk, and waitUntilFinished with QueueEvents. The producer answers the commands of
// kit.py; "work" runs a worker.
"use strict";

const fs = require("node:fs");
const { createRequire } = require("node:module");
const readline = require("node:readline");
// The package lies in the environment of its own that the script has made, not beside this file.
const { Queue, QueueEvents, Worker } = createRequire(process.env.BENCH_MODULES + "/package.json")("bullmq");

const NAME = "bench";
const SIZE = 200;
const WAIT = 20000; // milliseconds
const where = new URL(process.env.BENCH_URL);
const connection = { host: where.hostname, port: Number(where.port), maxRetriesPerRequest: null };

function payloadOf(n) {
  const bare = JSON.stringify({ n, text: "" }).length + 2; // Python writes a space after each colon and comma
  return { n, text: ".".repeat(Math.max(0, SIZE - bare - 1)) };
}

const sleep = (seconds) => new Promise((done) => setTimeout(done, seconds * 1000));
const now = () => Number(process.hrtime.bigint()) / 1e9;

class Agent {
  constructor() {
    this.jobs = [];
  }

  async open() {
    if (this.queue) await Promise.all([this.queue.close(), this.events.close()]);
    this.queue = new Queue(NAME, { connection });
    this.events = new QueueEvents(NAME, { connection });
    await Promise.all([this.queue.waitUntilReady(), this.events.waitUntilReady()]);
    return { bulk: true };
  }

  async submit({ number }) {
    const payloads = Array.from({ length: number }, (_, n) => payloadOf(n));
    this.jobs = [];
    const began = now();
    for (const payload of payloads) this.jobs.push(await this.queue.add("noop", payload));
    return { seconds: now() - began };
  }

  async bulk({ number }) {
    const rows = Array.from({ length: number }, (_, n) => ({ name: "noop", data: payloadOf(n) }));
    this.jobs = [];
    const began = now();
    // One call for all would be one block of twenty thousand scripts: nobody else would be served meanwhile.
    for (let first = 0; first < number; first += 1000)
      this.jobs.push(...(await this.queue.addBulk(rows.slice(first, first + 1000))));
    return { seconds: now() - began };
  }

  async check({ number, every }) {
    let wrong = 0;
    const examples = [];
    for (let place = 0; place < number; place += every) {
      const value = await this.jobs[place].waitUntilFinished(this.events, WAIT).catch(String);
      if (value !== place && wrong++ < 3) examples.push([place, String(value)]);
    }
    return { checked: Math.ceil(number / every), wrong, examples };
  }

  async latency({ number, pause, seconds }) {
    const ms = [];
    const until = now() + seconds;
    for (let place = 0; place < number && now() < until; place++) {
      if (pause) await sleep(pause);
      const payload = payloadOf(place);
      const began = now();
      const job = await this.queue.add("noop", payload);
      const value = await job.waitUntilFinished(this.events, WAIT);
      ms.push((now() - began) * 1000);
      if (value !== place) throw new Error(`request ${place} came back as ${value}`);
    }
    return { ms };
  }

  async walk({ payloads }) {
    this.jobs = [];
    for (const payload of payloads)
      this.jobs.push(await this.queue.add("walk", payload, { attempts: 10, backoff: { type: "fixed", delay: 0 } }));
    return {};
  }

  async ended() {
    return { results: await Promise.all(this.jobs.map((job) => job.waitUntilFinished(this.events, WAIT))) };
  }

  async load({ rate, seconds }) {
    const began = now();
    let done = 0;
    while (now() - began < seconds) {
      const due = Math.floor(rate * (now() - began)) - done;
      if (due > 0)
        await this.queue.addBulk(Array.from({ length: due }, (_, n) => ({ name: "noop", data: payloadOf(done + n) })));
      done += Math.max(0, due);
      await sleep(0.01);
    }
    return { submitted: done, seconds: now() - began };
  }
}

async function serve() {
  const agent = new Agent();
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const { do: name, ...rest } = JSON.parse(line);
    const answer = await agent[name](rest).catch((error) => ({ error: String(error) }));
    process.stdout.write(JSON.stringify(answer) + "\n");
  }
  process.exit(0);
}

// The steps of notes.py, in the same lines; hrtime is the machine's monotonic clock.
async function walk({ name, steps, seconds }) {
  for (let step = 0; step < steps; step++) {
    await sleep(seconds);
    fs.appendFileSync(process.env.BENCH_NOTES, `${name} ${process.pid} ${step} ${process.hrtime.bigint()} step\n`);
  }
  return steps;
}

if (process.argv[2] === "work") {
  new Worker(NAME, async (job) => job.data.n, { connection, concurrency: 50 });
} else if (process.argv[2] === "walk") {
  // One job at a time; a lock of a second, looked after twice as often: the fastest that is sane.
  new Worker(NAME, async (job) => walk(job.data), {
    connection, concurrency: 1, lockDuration: 1000, stalledInterval: 500, maxStalledCount: 10,
  });
} else {
  serve();
}
