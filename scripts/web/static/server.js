// How the page asks its server. A token goes in a header, and is kept for this tab alone.

export class ServerError extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

/** What the server answers as JSON; raises ServerError with its words. Paths are relative: the page may lie below a prefix. */
export async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { cache: "no-store", redirect: "error", ...options });
  } catch {
    throw new ServerError(0, "the server of this page does not answer");
  }
  const kind = answer.headers.get("content-type") || "";
  const value = kind.startsWith("application/json") ? await answer.json() : null;
  if (!answer.ok) throw new ServerError(answer.status, value?.error || `${answer.status} ${answer.statusText}`);
  return value;
}

export function send(path, token, value) {
  const headers = { Authorization: `Bearer ${token}`, "Content-Type": "application/json" };
  return ask(path, { method: "POST", headers, body: JSON.stringify(value ?? {}) });
}

const TOKEN = "perdure-token";

export const tokens = {
  get: () => sessionStorage.getItem(TOKEN) || "",
  set: (text) => sessionStorage.setItem(TOKEN, text),
  forget: () => sessionStorage.removeItem(TOKEN),
};

/**
 * Frames as they come. It ends while nobody looks at the tab, and begins again when somebody does.
 * told: { history, frame, lost } are called with what comes; lost when the server of the page does not answer.
 */
export class Stream {
  constructor(told) {
    this.told = told;
    this.source = null;
    this.timer = 0;
    document.addEventListener("visibilitychange", () => (document.hidden ? this.close() : this.open()));
    if (!document.hidden) this.open();
  }

  open() {
    if (this.source) return;
    clearTimeout(this.timer);
    this.source = new EventSource("api/stream");
    for (const name of ["history", "frame"]) {
      this.source.addEventListener(name, (event) => this.told[name](JSON.parse(event.data)));
    }
    this.source.addEventListener("error", () => {
      this.told.lost();
      // A refusal (as many watch as may) ends it for good; else the browser comes again by itself.
      if (this.source?.readyState === EventSource.CLOSED) {
        this.close();
        this.timer = setTimeout(() => this.open(), 5000);
      }
    });
  }

  close() {
    clearTimeout(this.timer);
    this.source?.close();
    this.source = null;
  }
}
