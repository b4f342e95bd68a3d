// What changes something, after asking. Failures go back in batches, so that each call is short and the bar moves.

import { ask, send, tokens } from "./server.js";

const BATCH = 50;

const part = (name) => document.getElementById(`dialog${name}`);

/** All failures of a group, as {id, queue}. */
export async function lettersOf(error) {
  const found = [];
  for (let cursor = 0; cursor !== null; ) {
    const page = await ask(`api/dead-letters/${encodeURIComponent(error)}?limit=200&cursor=${cursor}`);
    found.push(...page.items.map(({ id, queue }) => ({ id, queue })));
    cursor = page.cursor;
  }
  return found;
}

/**
 * Asks, then requeues what items() gives: once each, so that what fails again meanwhile is left alone.
 * Returns false if the person has thought better of it. kinds: those of the failures.
 */
export function requeue(app, title, items, number, kinds) {
  const one = number === 1;
  const text = `${number} ${one ? "failure goes" : "failures go"} back to where ${one ? "it" : "they"} waited. Attempts are reset; a checkpoint younger than an hour is resumed.`;
  const vain = kinds.some((kind) => app.final.includes(kind));
  const warning = ` ${kinds.join(", ")}: such an error cannot pass by itself. ${one ? "It fails" : "They fail"} again unless the task or its data has changed.`;
  return act(app, { title, text: vain ? text + warning : text, go: vain ? "Requeue all the same" : "Requeue" }, async (token, progress) => run(await items(), token, progress));
}

/** Asks for confirmation, and for the token if this tab has none yet; then does work(token, progress), which gives the sentence to show. */
export function act(app, { title, text, go: label }, work) {
  const [dialog, form] = [part(""), part("").querySelector("form")];
  const [go, cancel, token, progress, error] = ["-go", "-cancel", "-token", "-progress", "-error"].map(part);
  part("-title").textContent = title;
  part("-text").textContent = text;
  go.textContent = label;
  const asking = (problem = "") => {
    token.hidden = Boolean(tokens.get());
    form.elements.token.value = "";
    form.elements.token.required = !token.hidden;
    go.disabled = false;
    progress.hidden = true;
    error.textContent = problem;
  };
  asking();
  return new Promise((resolve) => {
    let working = false;
    let done = false;
    const end = () => {
      form.removeEventListener("submit", submit);
      cancel.removeEventListener("click", leave);
      dialog.removeEventListener("cancel", stay);
      resolve(done);
    };
    const leave = () => dialog.close();
    const stay = (event) => working && event.preventDefault();
    const submit = async (event) => {
      event.preventDefault();
      if (working) return;
      const given = token.hidden ? tokens.get() : form.elements.token.value.trim();
      working = true;
      go.disabled = cancel.disabled = true;
      try {
        await send("api/token", given);
        tokens.set(given);
        done = await work(given, progress);
        dialog.close();
        app.say(done);
      } catch (problem) {
        if (problem.status === 401) tokens.forget();
        asking(problem.message);
      } finally {
        working = cancel.disabled = false;
      }
    };
    form.addEventListener("submit", submit);
    cancel.addEventListener("click", leave);
    dialog.addEventListener("cancel", stay);
    dialog.addEventListener("close", end, { once: true });
    dialog.showModal();
  });
}

async function run(items, token, progress) {
  progress.max = items.length;
  progress.value = 0;
  progress.hidden = false;
  let [requeued, left] = [0, 0];
  for (let place = 0; place < items.length; place += BATCH) {
    const answer = await send("api/requeue", token, { items: items.slice(place, place + BATCH) });
    requeued += answer.requeued.length;
    left += answer.left.length;
    progress.value = requeued + left;
  }
  return `${requeued} requeued${left ? `, ${left} had left the failures before` : ""}.`;
}
